# An ordinary application that knows nothing of this project: a web server with two SQLite databases in its folder.
import http.server, json, os, sqlite3, sys, time

def connect(mode):
    return sqlite3.connect(os.path.join(os.environ['TWISTLOCK_FOLDER'], mode + '.db'), timeout=10, isolation_level=None)

def begun():
    ticks = int(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19])
    return ticks / os.sysconf('SC_CLK_TCK')

class Site(http.server.BaseHTTPRequestHandler):
    def answer(self, code, text):
        self.send_response(code)
        self.send_header('content-length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        mode = self.path.strip('/')
        if not mode:
            names = os.environ['TWISTLOCK_NODE'], os.environ['TWISTLOCK_EPOCH'], os.getpid(), STARTED
            return self.answer(200, '%s %s %d %d' % names)
        db = connect(mode)
        rows = [number for (number,) in db.execute('SELECT number FROM rows ORDER BY number')]
        found = [text for (text,) in db.execute('PRAGMA integrity_check')]
        db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        db.close()
        self.answer(200, json.dumps({'rows': rows, 'found': found}))

    def do_POST(self):
        mode, number = self.path.strip('/').split('/')
        try:
            db = connect(mode.removesuffix('-memory'))
            if mode.endswith('-memory'):
                db.execute('PRAGMA journal_mode=MEMORY')
            db.execute('INSERT INTO rows VALUES (?, randomblob(3000))', (int(number),))
            self.answer(200, 'stored')
        except sqlite3.Error as error:
            self.answer(500, str(error))

    def log_message(self, *words): pass

for mode in ('wal', 'delete'):
    db = connect(mode)
    db.execute('PRAGMA journal_mode=' + mode)
    db.execute('CREATE TABLE IF NOT EXISTS rows(number INTEGER PRIMARY KEY, data)')
    db.close()
http.server.ThreadingHTTPServer.allow_reuse_address = True
server = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Site)
# Milliseconds from its first instruction until it listens.
STARTED = int((float(open('/proc/uptime').read().split()[0]) - begun()) * 1000)
server.serve_forever()

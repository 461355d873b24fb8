// Sends requests to the API. Owns the session as far as a page can: the token itself is in a cookie that no script can
// read. Must never repeat a change by itself.

const BASE = '/api/v1';
const LONGEST = 30_000;

// What went wrong, in words for people. Status 0 means that there was no answer.
export class Problem extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

const listeners = { expired: () => {}, lost: () => {}, recovered: async () => false };

// Sets what is called when the session has ended, when nobody answers, and to wait until somebody answers again.
export function onTrouble(told) {
  Object.assign(listeners, told);
}

// Proves to the daemon that a request comes from this page: other sites cannot send this header.
export const HEADERS = { 'X-Twistlock-Page': '1' };

async function text(response) {
  const body = await response.text();
  try {
    return JSON.parse(body).err ?? body;
  } catch {
    return body;
  }
}

// Sends one request. Returns the response, whatever its status.
export async function send(method, path, { body, limit = LONGEST } = {}) {
  const headers = { ...HEADERS };
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  const signal = AbortSignal.timeout(limit);
  const options = { method, headers, signal, cache: 'no-store', credentials: 'same-origin' };
  if (body !== undefined) options.body = JSON.stringify(body);
  try {
    return await fetch(BASE + path, options);
  } catch {
    listeners.lost();
    const what = method === 'GET' ? '' : ' The change may have been made: check before you repeat it.';
    throw new Problem(0, `The PRIMARY does not answer.${what}`);
  }
}

// Sends a request. One that changes nothing is sent once more when there is a PRIMARY again.
async function ask(method, path, body) {
  try {
    return await send(method, path, { body });
  } catch (error) {
    if (method !== 'GET' || !(await listeners.recovered())) throw error;
    return send(method, path, { body });
  }
}

async function call(method, path, body) {
  const response = await ask(method, path, body);
  if (response.status === 401) {
    listeners.expired();
    throw new Problem(401, 'Your session has ended: log in again.');
  }
  if (!response.ok) throw new Problem(response.status, await text(response));
  const { headers } = response;
  const kind = headers.get('content-type') ?? '';
  const answer = kind.startsWith('application/json') ? await response.json() : await response.text();
  return { answer, total: Number(headers.get('x-total-count')), next: headers.get('x-next-cursor') };
}

export const get = async (path) => (await call('GET', path)).answer;
export const post = async (path, body) => (await call('POST', path, body)).answer;
export const put = async (path, body) => (await call('PUT', path, body)).answer;
export const patch = async (path, body) => (await call('PATCH', path, body)).answer;
export const remove = async (path) => (await call('DELETE', path)).answer;

// One page of a list: the first one, with the number of all rows, or that of a cursor; and the cursor of the next page, if
// the list has cursors.
export async function list(path, limit, cursor) {
  const where = cursor ? `&cursor=${part(cursor)}` : '';
  const { answer, total, next } = await call('GET', `${path}${path.includes('?') ? '&' : '?'}limit=${limit}${where}`);
  return { rows: Array.isArray(answer) ? answer : [], total: total || 0, next };
}

// Encodes a name as a part of a path.
export const part = encodeURIComponent;

// Whether the first administrator exists.
export async function isInitialized() {
  return (await get('/settings/initialized')).initialized;
}

export async function signUp(username, password) {
  await post('/signup', { username, password });
}

// { username, role, expiresInSec }.
export const whoIs = () => get('/authenticate');

// Throws the daemon's reason: a wrong password, or too many attempts.
export async function logIn(username, password) {
  const response = await send('POST', '/authenticate', { body: { username, password } });
  if (!response.ok) throw new Problem(response.status, await text(response));
}

let renewal = 0;
let active = false;
for (const type of ['pointerdown', 'keydown']) document.addEventListener(type, () => { active = true; }, { passive: true });

// Renews the session before it ends, for as long as somebody uses the page. A page that is only open keeps nobody
// logged in.
export function keepSession(seconds) {
  clearTimeout(renewal);
  // Near its end, the session is allowed to end.
  if (!(seconds > 5)) return;
  renewal = setTimeout(async () => {
    let left = seconds / 2;
    try {
      if (active) left = (await get('/authenticate/renew')).expiresInSec;
      active = false;
    } catch {
      // No answer at the moment. The session goes on at the next PRIMARY, so this is tried again there.
    }
    keepSession(left);
  }, Math.min(seconds * 500, 2 ** 30));
}

// Throws if the session goes on: nobody must think that it has ended.
export async function logOut() {
  const response = await send('POST', '/logout');
  if (!response.ok && response.status !== 401) throw new Problem(response.status, await text(response));
  clearTimeout(renewal);
}

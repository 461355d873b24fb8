/* Preloaded into a daemon: makes chosen operations on files of its data folder fail or hang, and steps its wall clock, as the
 * test's process asks by a shared page (preload.rs). Must never touch a socket, nor a file outside of the data folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The page, as preload.rs writes it. */
struct wish {
    volatile int64_t clock;       /* nanoseconds that the wall clock is ahead */
    volatile uint32_t operations; /* which fail or hang */
    volatile uint32_t error;      /* with which errno; 0: none */
    volatile uint32_t hang;       /* milliseconds that each one takes longer, at most as long as it is wished */
    volatile uint32_t files;      /* of which files */
};
enum { READ = 1, WRITE = 2, SYNC = 4, OPEN = 8 };
enum { LOG = 1, DATABASE = 2, OTHERS = 4 };

static struct wish none, *wish = &none;
static char folder[4096];
static size_t length;

__attribute__((constructor)) static void begin(void) {
    const char *page = getenv("CHAOS_PAGE"), *data = getenv("CHAOS_DATA"), *slot = getenv("CHAOS_SLOT");
    if (!page || !data || !slot || strlen(data) >= sizeof folder - 1)
        return;
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int fd = real(page, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    char *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return;
    length = (size_t)snprintf(folder, sizeof folder, "%s/", data);
    wish = (struct wish *)(map + 64 * (atoi(slot) & 15));
}

static int kind_of(const char *path) {
    if (strncmp(path, folder, length))
        return 0;
    path += length;
    if (!strncmp(path, "raft-log/", 9))
        return LOG;
    return strncmp(path, "database/", 9) ? OTHERS : DATABASE;
}

/* Waits as wished. Returns the errno to fail with, or 0. */
static int meet(int operation, const char *path) {
    if (!(wish->operations & operation) || !(wish->files & kind_of(path)))
        return 0;
    for (uint32_t waited = 0; waited < wish->hang && wish->operations & operation; waited += 5) {
        struct timespec step = {0, 5000000};
        nanosleep(&step, NULL);
    }
    return wish->operations & operation ? (int)wish->error : 0;
}

static int fails(int operation, int fd) {
    if (!(wish->operations & operation))
        return 0;
    int saved = errno, error = 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size > 0) {
        path[size] = 0;
        error = meet(operation, path);
    }
    errno = error ? error : saved;
    return error;
}

#define REAL(type, name, ...)                                                                                               \
    static type (*real)(__VA_ARGS__);                                                                                       \
    if (!real)                                                                                                              \
    real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define ON_FD(operation, type, name, types, parameters, arguments)                                                           \
    type name parameters {                                                                                                  \
        static type(*real) types;                                                                                           \
        if (!real)                                                                                                          \
            real = (type(*) types)dlsym(RTLD_NEXT, #name);                                                                  \
        return fails(operation, fd) ? -1 : real arguments;                                                                  \
    }

ON_FD(READ, ssize_t, read, (int, void *, size_t), (int fd, void *b, size_t n), (fd, b, n))
ON_FD(READ, ssize_t, pread, (int, void *, size_t, off_t), (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(READ, ssize_t, pread64, (int, void *, size_t, off64_t), (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(WRITE, ssize_t, write, (int, const void *, size_t), (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(WRITE, ssize_t, pwrite, (int, const void *, size_t, off_t), (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(WRITE, ssize_t, pwrite64, (int, const void *, size_t, off64_t), (int fd, const void *b, size_t n, off64_t o),
      (fd, b, n, o))
ON_FD(WRITE, ssize_t, writev, (int, const struct iovec *, int), (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(WRITE, ssize_t, pwritev, (int, const struct iovec *, int, off_t), (int fd, const struct iovec *v, int n, off_t o),
      (fd, v, n, o))
ON_FD(WRITE, ssize_t, pwritev64, (int, const struct iovec *, int, off64_t),
      (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
ON_FD(WRITE, int, ftruncate, (int, off_t), (int fd, off_t n), (fd, n))
ON_FD(WRITE, int, ftruncate64, (int, off64_t), (int fd, off64_t n), (fd, n))
ON_FD(WRITE, int, fallocate, (int, int, off_t, off_t), (int fd, int m, off_t o, off_t n), (fd, m, o, n))
ON_FD(WRITE, int, fallocate64, (int, int, off64_t, off64_t), (int fd, int m, off64_t o, off64_t n), (fd, m, o, n))
ON_FD(SYNC, int, fsync, (int), (int fd), (fd))
ON_FD(SYNC, int, fdatasync, (int), (int fd), (fd))
ON_FD(SYNC, int, sync_file_range, (int, off64_t, off64_t, unsigned), (int fd, off64_t o, off64_t n, unsigned f), (fd, o, n, f))

/* This one returns the error itself. */
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    int error = fails(WRITE, fd);
    return error ? error : real(fd, o, n);
}

#define ON_PATH(name)                                                                                                       \
    int name(const char *path, int flags, ...) {                                                                            \
        static int (*real)(const char *, int, ...);                                                                         \
        if (!real)                                                                                                          \
            real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);                                                \
        va_list more;                                                                                                       \
        va_start(more, flags);                                                                                              \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;                                           \
        va_end(more);                                                                                                       \
        int error = meet(OPEN, path);                                                                                       \
        if (error) {                                                                                                        \
            errno = error;                                                                                                  \
            return -1;                                                                                                      \
        }                                                                                                                   \
        return real(path, flags, mode);                                                                                     \
    }
ON_PATH(open)
ON_PATH(open64)

/* The wall clock. Monotonic clocks are as they are. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(clock, now);
    if (!result && wish->clock && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t nanoseconds = now->tv_nsec + wish->clock % 1000000000;
        now->tv_sec += wish->clock / 1000000000 + (nanoseconds < 0 ? -1 : nanoseconds >= 1000000000);
        now->tv_nsec = (nanoseconds + 1000000000) % 1000000000;
    }
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    (void)zone;
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

/* Preloaded into a daemon: makes chosen operations on chosen files fail or hang, and steps its wall clock, as the test's process
 * asks by a shared page (preload.rs): a clock for each slot, and rules of which each is a line "OPERATIONS PART-OF-PATH ACTION".
 * Operations: r read, w write, s sync, o open. A part that ends in '$' is the end of the path. Actions: eio, enospc, hang (until the rule is
 * gone), delay:MILLISECONDS. */
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

enum { PAGE = 4096, SLOTS = 16, RULES = SLOTS * sizeof(int64_t), STEP_MS = 5 };

/* Nanoseconds that the wall clock is ahead. */
static const volatile int64_t good, *ahead = &good;
/* '1' while the rules behind it are in force. */
static const volatile char *rules = "0";

__attribute__((constructor)) static void begin(void) {
    const char *page = getenv("TEST_FAULTS_PAGE"), *slot = getenv("TEST_FAULTS_SLOT");
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    int fd = page ? real(page, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    char *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return;
    ahead = (const int64_t *)map + (slot ? atoi(slot) % SLOTS : 0);
    rules = map + RULES;
}

static int is_part(const char *path, char *part) {
    size_t length = strlen(part), all = strlen(path);
    if (part[length - 1] != '$')
        return strstr(path, part) != NULL;
    part[--length] = 0;
    return all >= length && !strcmp(path + all - length, part);
}

/* The action of the first rule for it. */
static int finds(char operation, const char *path, char *action) {
    if (rules[0] != '1')
        return 0;
    char text[PAGE - RULES + 1], operations[16], part[512], *rest;
    memcpy(text, (const char *)rules, PAGE - RULES);
    text[PAGE - RULES] = 0;
    for (char *line = strtok_r(text + 1, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (sscanf(line, "%15s %511s %63s", operations, part, action) == 3 && strchr(operations, operation) && is_part(path, part))
            return 1;
    return 0;
}

/* Waits as the rules say. Returns the errno to fail with, or 0. */
static int meet(char operation, const char *path) {
    char action[64];
    for (long waited = 0; finds(operation, path, action); waited += STEP_MS) {
        if (!strcmp(action, "eio"))
            return EIO;
        if (!strcmp(action, "enospc"))
            return ENOSPC;
        if (!strncmp(action, "delay:", 6) && waited >= atol(action + 6))
            return 0;
        struct timespec step = {0, STEP_MS * 1000000};
        nanosleep(&step, NULL);
    }
    return 0;
}

static int fails(char operation, int fd) {
    if (rules[0] != '1')
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

ON_FD('r', ssize_t, read, (int, void *, size_t), (int fd, void *b, size_t n), (fd, b, n))
ON_FD('r', ssize_t, pread, (int, void *, size_t, off_t), (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD('r', ssize_t, pread64, (int, void *, size_t, off64_t), (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD('w', ssize_t, write, (int, const void *, size_t), (int fd, const void *b, size_t n), (fd, b, n))
ON_FD('w', ssize_t, pwrite, (int, const void *, size_t, off_t), (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD('w', ssize_t, pwrite64, (int, const void *, size_t, off64_t), (int fd, const void *b, size_t n, off64_t o),
      (fd, b, n, o))
ON_FD('w', ssize_t, writev, (int, const struct iovec *, int), (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD('w', ssize_t, pwritev, (int, const struct iovec *, int, off_t), (int fd, const struct iovec *v, int n, off_t o),
      (fd, v, n, o))
ON_FD('w', ssize_t, pwritev64, (int, const struct iovec *, int, off64_t),
      (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
ON_FD('w', int, ftruncate, (int, off_t), (int fd, off_t n), (fd, n))
ON_FD('w', int, ftruncate64, (int, off64_t), (int fd, off64_t n), (fd, n))
ON_FD('w', int, fallocate, (int, int, off_t, off_t), (int fd, int m, off_t o, off_t n), (fd, m, o, n))
ON_FD('w', int, fallocate64, (int, int, off64_t, off64_t), (int fd, int m, off64_t o, off64_t n), (fd, m, o, n))
ON_FD('s', int, fsync, (int), (int fd), (fd))
ON_FD('s', int, fdatasync, (int), (int fd), (fd))
ON_FD('s', int, sync_file_range, (int, off64_t, off64_t, unsigned), (int fd, off64_t o, off64_t n, unsigned f), (fd, o, n, f))

/* This one returns the error itself. */
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    int error = fails('w', fd);
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
        int error = meet('o', path);                                                                                       \
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
    int64_t by = *ahead;
    if (!result && by && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t nanoseconds = now->tv_nsec + by % 1000000000;
        now->tv_sec += by / 1000000000 + (nanoseconds < 0 ? -1 : nanoseconds >= 1000000000);
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

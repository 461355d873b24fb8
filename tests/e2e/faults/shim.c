/* Preloaded into the daemons: fails, delays or holds back what they do to chosen files. TW_DISK_FAULTS names a file of one page that
 * is mapped: its first byte is '1' while rules are in force, each of which is a line "OPERATIONS PART-OF-PATH ACTION". Operations:
 * r read, w write, s sync. A part that ends in '$' is the end of the path. Actions: eio, hang (until the rule is gone),
 * delay:MILLISECONDS. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
static const volatile char *rules;

__attribute__((constructor)) static void map_rules(void) {
    const char *name = getenv("TW_DISK_FAULTS");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) rules = page;
}

static int is_part(const char *path, char *part) {
    size_t length = strlen(part), all = strlen(path);
    if (part[length - 1] != '$') return strstr(path, part) != NULL;
    part[--length] = 0;
    return all >= length && strcmp(path + all - length, part) == 0;
}

static int finds(int file, char operation, char *action) {
    char link[64], path[1024], text[PAGE + 1], operations[16], part[512], *rest;
    if (!rules || rules[0] != '1') return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    memcpy(text, (const void *)rules, PAGE);
    text[PAGE] = 0;
    for (char *line = strtok_r(text + 1, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (sscanf(line, "%15s %511s %63s", operations, part, action) == 3 && strchr(operations, operation) && is_part(path, part))
            return 1;
    return 0;
}

/* True if the operation is to fail. */
static int fails(int file, char operation) {
    char action[64];
    int before = errno;
    while (finds(file, operation, action)) {
        if (strcmp(action, "eio") == 0) {
            errno = EIO;
            return 1;
        }
        if (strncmp(action, "delay:", 6) == 0) {
            usleep(atoi(action + 6) * 1000);
            break;
        }
        usleep(10000);
    }
    errno = before;
    return 0;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

#define OPERATION(kind, type, name, parameters, arguments, ...)                                                      \
    type name parameters {                                                                                            \
        static type(*real)(__VA_ARGS__);                                                                              \
        if (!real) real = REAL(type, name, __VA_ARGS__);                                                              \
        return fails(file, kind) ? -1 : real arguments;                                                               \
    }

OPERATION('r', ssize_t, read, (int file, void *to, size_t n), (file, to, n), int, void *, size_t)
OPERATION('r', ssize_t, pread, (int file, void *to, size_t n, off_t at), (file, to, n, at), int, void *, size_t, off_t)
OPERATION('r', ssize_t, pread64, (int file, void *to, size_t n, off64_t at), (file, to, n, at), int, void *, size_t, off64_t)
OPERATION('w', ssize_t, write, (int file, const void *of, size_t n), (file, of, n), int, const void *, size_t)
OPERATION('w', ssize_t, pwrite, (int file, const void *of, size_t n, off_t at), (file, of, n, at), int, const void *, size_t, off_t)
OPERATION('w', ssize_t, pwrite64, (int file, const void *of, size_t n, off64_t at), (file, of, n, at), int, const void *, size_t, off64_t)
OPERATION('s', int, fsync, (int file), (file), int)
OPERATION('s', int, fdatasync, (int file), (file), int)

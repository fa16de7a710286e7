/* A disk that fails, is slow or lies, and a clock that jumps: preloaded into a process, and ordered from outside.

   FAULTY_CONTROL names a file of int64s that both processes map, FAULTY_FOLDER the folder whose files are met. Each
   call on such a file is a hit; those from the `first` on, `count` of them, are disturbed as `kind` says. */
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
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, READ_FAILS, READ_IS_SHORT, READ_IS_SLOW, BIT_FLIPS, OPEN_FAILS, MAP_FAILS };
enum { KIND, FIRST, COUNT, VALUE, HITS, CLOCK_NS, CLOCK_CALLS, HUGE_PAGES, WORDS };

static volatile int64_t *control;
static const char *folder;
static size_t folder_length;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTY_CONTROL");
    folder = getenv("FAULTY_FOLDER");
    if (!name || !folder) return;
    folder_length = strlen(folder);
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    void *(*real_mmap)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    int descriptor = real_open(name, O_RDWR | O_CLOEXEC);
    if (descriptor < 0) abort();
    void *mapped = real_mmap(0, WORDS * sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED) abort();
    control = mapped;
    close(descriptor);
}

static int below(const char *path) {
    return control && !strncmp(path, folder, folder_length) && path[folder_length] == '/';
}

/* Whether an open file is one of the folder's. */
static int of_folder(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path) || !strcmp(path, folder);
}

/* Whether a path, within an open folder where it is not absolute, is one of the folder's. */
static int within(int at, const char *path) {
    return path[0] == '/' || at == AT_FDCWD ? below(path) : of_folder(at);
}

/* Whether this call is one that is disturbed. */
static int met(int kind) {
    if (control[KIND] != kind) return 0;
    int64_t number = __atomic_add_fetch(&control[HITS], 1, __ATOMIC_SEQ_CST);
    return number >= control[FIRST] && number - control[FIRST] < control[COUNT];
}

static int fails(int kind) {
    if (!met(kind)) return 0;
    errno = (int)control[VALUE];
    return 1;
}

static int is_read_disturbed(int descriptor) {
    return control && control[KIND] >= READ_FAILS && control[KIND] <= BIT_FLIPS && of_folder(descriptor);
}

/* The bytes that a read has brought, disturbed. A read that moves the file's place goes back by what it leaves out. */
static ssize_t brought(int descriptor, ssize_t count, const struct iovec *parts, int moves) {
    if (count <= 0) return count;
    if (met(READ_IS_SHORT)) {
        ssize_t less = (count + 2) / 3;
        if (moves) lseek(descriptor, less - count, SEEK_CUR);
        return less;
    }
    if (met(BIT_FLIPS)) ((char *)parts[0].iov_base)[(control[VALUE] < (int64_t)parts[0].iov_len ? control[VALUE] : 0) % count] ^= 1;
    return count;
}

static void wait_if_slow(void) {
    if (met(READ_IS_SLOW)) {
        struct timespec time = {control[VALUE] / 1000000000, control[VALUE] % 1000000000};
        nanosleep(&time, 0);
    }
}

#define READ(NAME, PARAMETERS, ARGUMENTS, BASE, LENGTH, MOVES)                   \
    ssize_t NAME PARAMETERS {                                                    \
        static ssize_t(*real) PARAMETERS;                                        \
        if (!real) real = (ssize_t(*) PARAMETERS)dlsym(RTLD_NEXT, #NAME);        \
        if (!is_read_disturbed(descriptor)) return real ARGUMENTS;               \
        if (fails(READ_FAILS)) return -1;                                        \
        wait_if_slow();                                                          \
        struct iovec whole = {BASE, LENGTH};                                     \
        return brought(descriptor, real ARGUMENTS, &whole, MOVES);               \
    }

READ(read, (int descriptor, void *to, size_t n), (descriptor, to, n), to, n, 1)
READ(pread, (int descriptor, void *to, size_t n, off_t at), (descriptor, to, n, at), to, n, 0)
READ(pread64, (int descriptor, void *to, size_t n, off64_t at), (descriptor, to, n, at), to, n, 0)
READ(readv, (int descriptor, const struct iovec *to, int n), (descriptor, to, n), to[0].iov_base, to[0].iov_len, 1)
READ(preadv, (int descriptor, const struct iovec *to, int n, off_t at), (descriptor, to, n, at), to[0].iov_base, to[0].iov_len, 0)
READ(preadv64, (int descriptor, const struct iovec *to, int n, off64_t at), (descriptor, to, n, at), to[0].iov_base, to[0].iov_len, 0)
READ(preadv2, (int descriptor, const struct iovec *to, int n, off_t at, int flags), (descriptor, to, n, at, flags), to[0].iov_base, to[0].iov_len, 0)
READ(preadv64v2, (int descriptor, const struct iovec *to, int n, off64_t at, int flags), (descriptor, to, n, at, flags), to[0].iov_base, to[0].iov_len, 0)

#define OPEN(NAME, PARAMETERS, ARGUMENTS, AT)                                        \
    int NAME PARAMETERS {                                                        \
        static int(*real) PARAMETERS;                                            \
        if (!real) real = (int(*) PARAMETERS)dlsym(RTLD_NEXT, #NAME);            \
        va_list rest;                                                            \
        va_start(rest, flags);                                                   \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                            \
        if (control && control[KIND] == OPEN_FAILS && within(AT, path) && fails(OPEN_FAILS)) return -1; \
        return real ARGUMENTS;                                                   \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

#define MAP(NAME, OFFSET)                                                                          \
    void *NAME(void *place, size_t n, int rights, int flags, int descriptor, OFFSET at) {          \
        static void *(*real)(void *, size_t, int, int, int, OFFSET);                               \
        if (!real) real = (void *(*)(void *, size_t, int, int, int, OFFSET))dlsym(RTLD_NEXT, #NAME); \
        if (control && descriptor >= 0 && control[KIND] == MAP_FAILS && of_folder(descriptor) && fails(MAP_FAILS)) \
            return MAP_FAILED;                                                                     \
        void *found = real(place, n, rights, flags, descriptor, at);                               \
        if (control && control[HUGE_PAGES] && descriptor < 0 && found != MAP_FAILED) {             \
            int before = errno;                                                                    \
            madvise(found, n, MADV_HUGEPAGE);                                                      \
            errno = before;                                                                        \
        }                                                                                          \
        return found;                                                                              \
    }

MAP(mmap, off_t)
MAP(mmap64, off64_t)

/* The clock of the day goes ahead by CLOCK_NS at one look, and back by as much at the next. */
int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (result == 0 && clock == CLOCK_REALTIME && control && control[CLOCK_NS]) {
        int64_t number = __atomic_add_fetch(&control[CLOCK_CALLS], 1, __ATOMIC_SEQ_CST);
        int64_t now = time->tv_sec * 1000000000 + time->tv_nsec + (number % 2 ? control[CLOCK_NS] : -control[CLOCK_NS]);
        time->tv_sec = now / 1000000000;
        time->tv_nsec = now % 1000000000;
    }
    return result;
}

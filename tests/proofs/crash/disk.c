/* A disk that fails, fills up, or loses power: loaded before libc with LD_PRELOAD.

   It concerns files whose names end in ".db" or ".db-wal" only. DISK_CONTROL names a file with
   four 32-bit numbers that a test may change at any time:

     fail_syncs    after so many more syncs, each one fails with EIO; -1: never
     fail_writes   after so many more writes, each one fails with ENOSPC; -1: never
     ignore_syncs  1: a sync does nothing, and says that all is well
     read_only     1: nothing can be opened to be written

   DISK_SHADOW names a folder that gets what a power cut would leave. The file of the same name there
   begins as a copy, and a write reaches it when a sync returns. Every second write reaches it at once too, as a
   disk may write before it is told to. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FILES 4096

struct control {
    volatile int32_t fail_syncs, fail_writes, ignore_syncs, read_only;
};

struct change { /* a write, or with `size` -1 a truncation to `at` */
    struct change *next;
    int64_t at, size;
    char data[];
};

struct shadow {
    int fd;
    struct change *first, **last;
    unsigned writes;
};

static int (*real_open)(const char *, int, ...);
static int (*real_close)(int);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fdatasync)(int);
static int (*real_fsync)(int);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct control *control;
static const char *folder;
static struct shadow *shadows[FILES]; /* by file descriptor */

__attribute__((constructor)) static void begin(void)
{
    real_open = dlsym(RTLD_NEXT, "open64");
    real_close = dlsym(RTLD_NEXT, "close");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    folder = getenv("DISK_SHADOW");
    const char *path = getenv("DISK_CONTROL");
    int fd = path ? real_open(path, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ, MAP_SHARED, fd, 0);
    real_close(fd);
    if (mapped != MAP_FAILED)
        control = mapped;
}

static int concerns(const char *path)
{
    size_t length = strlen(path);
    return (length > 3 && !strcmp(path + length - 3, ".db")) ||
           (length > 7 && !strcmp(path + length - 7, ".db-wal"));
}

static struct shadow *shadow_of(int fd)
{
    return fd >= 0 && fd < FILES ? shadows[fd] : NULL;
}

static void change(struct shadow *shadow, const struct change *made)
{
    if (made->size < 0)
        real_ftruncate(shadow->fd, made->at);
    else
        real_pwrite(shadow->fd, made->data, made->size, made->at);
}

static void note(struct shadow *shadow, int64_t at, int64_t size, const void *data)
{
    struct change *made = malloc(sizeof *made + (size > 0 ? size : 0));
    if (!made)
        abort();
    made->next = NULL;
    made->at = at;
    made->size = size;
    if (size > 0)
        memcpy(made->data, data, size);
    *shadow->last = made;
    shadow->last = &made->next;
    if (size > 0 && shadow->writes++ % 2)
        change(shadow, made);
}

/* All connections of a process share what is on the disk, so they share the shadow of a file. */
static struct shadow *named[2];

int open64(const char *path, int flags, ...)
{
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    if (control && control->read_only && (flags & O_ACCMODE) != O_RDONLY && concerns(path)) {
        errno = EROFS;
        return -1;
    }
    int fd = real_open(path, flags, mode);
    if (fd < 0 || fd >= FILES || !folder || !concerns(path))
        return fd;
    pthread_mutex_lock(&lock);
    int wal = path[strlen(path) - 1] == 'l';
    if (!named[wal]) {
        char name[4096], block[4096];
        ssize_t size;
        const char *base = strrchr(path, '/');
        snprintf(name, sizeof name, "%s/%s", folder, base ? base + 1 : path);
        struct shadow *made = calloc(1, sizeof *made);
        if (!made || (made->fd = real_open(name, O_RDWR | O_CREAT | O_TRUNC, 0644)) < 0)
            abort();
        for (off_t at = 0; (size = pread(fd, block, sizeof block, at)) > 0; at += size)
            real_pwrite(made->fd, block, size, at);
        made->last = &made->first;
        named[wal] = made;
    }
    shadows[fd] = named[wal];
    pthread_mutex_unlock(&lock);
    return fd;
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));

int close(int fd)
{
    pthread_mutex_lock(&lock);
    if (fd >= 0 && fd < FILES)
        shadows[fd] = NULL;
    pthread_mutex_unlock(&lock);
    return real_close(fd);
}

static int due(volatile int32_t *left)
{
    /* A test writes the file, so the count is kept here. */
    static int32_t told[2], counts[2];
    int n = left == &control->fail_writes;
    if (*left != told[n]) {
        told[n] = *left;
        counts[n] = *left;
    }
    if (*left < 0)
        return 0;
    return counts[n]-- <= 0;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at)
{
    struct shadow *shadow = shadow_of(fd);
    if (!shadow)
        return real_pwrite(fd, data, size, at);
    pthread_mutex_lock(&lock);
    ssize_t written = -1;
    if (control && due(&control->fail_writes))
        errno = ENOSPC;
    else
        written = real_pwrite(fd, data, size, at);
    if (written > 0)
        note(shadow, at, written, data);
    pthread_mutex_unlock(&lock);
    return written;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) __attribute__((alias("pwrite64")));

int ftruncate64(int fd, off_t size)
{
    struct shadow *shadow = shadow_of(fd);
    int result = real_ftruncate(fd, size);
    if (shadow && !result) {
        pthread_mutex_lock(&lock);
        note(shadow, size, -1, NULL);
        pthread_mutex_unlock(&lock);
    }
    return result;
}

int ftruncate(int fd, off_t size) __attribute__((alias("ftruncate64")));

static int synced(int fd, int (*really)(int))
{
    struct shadow *shadow = shadow_of(fd);
    if (!shadow)
        return really(fd);
    pthread_mutex_lock(&lock);
    int result = 0;
    if (control && due(&control->fail_syncs)) {
        errno = EIO;
        result = -1;
    } else if (!control || !control->ignore_syncs) {
        result = really(fd);
        while (shadow->first) {
            struct change *made = shadow->first;
            change(shadow, made);
            shadow->first = made->next;
            free(made);
        }
        shadow->last = &shadow->first;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int fdatasync(int fd)
{
    return synced(fd, real_fdatasync);
}

int fsync(int fd)
{
    return synced(fd, real_fsync);
}

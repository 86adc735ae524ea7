/* Kills the process with SIGKILL just before its N-th change to a folder.
 *
 * Preloaded (LD_PRELOAD). TRAINER_TEST_KILL_IN names the folder, TRAINER_TEST_KILL_AT the change, counted from 1: files
 * opened to be written, renames, removals, folders made, and syncs, which stand for what a raw system call did before. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int changes;

static void strike(const char *path) {
    const char *folder = getenv("TRAINER_TEST_KILL_IN"), *at = getenv("TRAINER_TEST_KILL_AT");
    if (folder == NULL || at == NULL || path == NULL || strncmp(path, folder, strlen(folder)) != 0) return;
    if (__atomic_add_fetch(&changes, 1, __ATOMIC_SEQ_CST) == atoi(at)) kill(getpid(), SIGKILL);
}

static void strike_at(int fd, const char *name) {
    char link[64], path[PATH_MAX * 2];
    if (name != NULL && name[0] == '/') { strike(name); return; }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return;
    path[length] = 0;
    if (name != NULL) { strcat(path, "/"); strncat(path, name, PATH_MAX - 2); }
    strike(path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int rename(const char *from, const char *to) { REAL(rename); strike(from); return real(from, to); }
int unlink(const char *path) { REAL(unlink); strike(path); return real(path); }
int rmdir(const char *path) { REAL(rmdir); strike(path); return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); strike(path); return real(path, mode); }
int unlinkat(int fd, const char *name, int flags) { REAL(unlinkat); strike_at(fd, name); return real(fd, name, flags); }
int fsync(int fd) { REAL(fsync); strike_at(fd, NULL); return real(fd); }

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (flags & (O_CREAT | O_WRONLY | O_RDWR)) strike(path);
    return real(path, flags, mode);
}

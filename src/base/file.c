/* Files (see file.h). POSIX. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/error.h"
#include "base/mem.h"

static const char *file_kind(mode_t mode) {
    if (S_ISDIR(mode)) return "a folder";
    if (S_ISFIFO(mode)) return "a FIFO";
    if (S_ISSOCK(mode)) return "a socket";
    if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
    return "no regular file";
}

/* O_NONBLOCK: opening a FIFO without a writer must not hang; it has no effect on the regular files that are accepted. */
static aq_status open_regular(int *fd, struct stat *st, const char *path, bool no_follow, aq_error *err) {
    *fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY | (no_follow ? O_NOFOLLOW : 0));
    if (*fd < 0 && no_follow && errno == ELOOP) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a symbolic link, which --no-follow-symlinks refuses");
    if (*fd < 0 && errno == ELOOP) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a loop of symbolic links");
    if (*fd < 0 && errno == ENXIO) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a socket or device, expected a regular file");
    if (*fd < 0) return aq_fail_io(err, errno, path, "cannot open");
    if (fstat(*fd, st) != 0) {
        int e = errno;
        close(*fd);
        return aq_fail_io(err, e, path, "cannot read its size");
    }
    if (!S_ISREG(st->st_mode)) {
        close(*fd);
        return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is %s, expected a regular file", file_kind(st->st_mode));
    }
    return AQ_OK;
}

aq_status aq_file_map_open(aq_file_map *out, const char *path, bool no_follow, aq_error *err) {
    struct stat st;
    memset(out, 0, sizeof *out);
    out->fd = -1;
    int fd;
    aq_status status = open_regular(&fd, &st, path, no_follow, err);
    if (status != AQ_OK) return status;
    if (st.st_size > 0) {
        void *p = (uint64_t)st.st_size > SIZE_MAX ? MAP_FAILED : mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            int e = errno;
            close(fd);
            return aq_fail_io(err, e, path, "cannot map %lld bytes", (long long)st.st_size);
        }
        out->data = p;
    }
    out->fd = fd;
    out->size = (uint64_t)st.st_size;
    out->mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
    return AQ_OK;
}

void aq_file_map_close(aq_file_map *map) {
    if (map->data) munmap((void *)(uintptr_t)map->data, (size_t)map->size);
    if (map->fd >= 0) close(map->fd);
    memset(map, 0, sizeof *map);
    map->fd = -1;
}

void aq_file_map_release(const aq_file_map *map, uint64_t offset, uint64_t size) {
    if (!map->data || offset >= map->size) return;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), begin = (offset + page - 1) / page * page;
    uint64_t end = size > map->size - offset ? map->size : offset + size;
    end = end == map->size ? end : end / page * page; /* a page shared with a neighbour stays */
    if (begin < end) madvise((void *)(uintptr_t)(map->data + begin), (size_t)(end - begin), MADV_DONTNEED);
}

aq_status aq_file_open(int *fd, uint64_t *size, const char *path, aq_error *err) {
    struct stat st;
    *fd = -1;
    aq_status status = open_regular(fd, &st, path, false, err);
    if (status != AQ_OK) *fd = -1;
    *size = status == AQ_OK ? (uint64_t)st.st_size : 0;
    return status;
}

aq_status aq_file_pread(int fd, void *out, uint64_t size, uint64_t offset, const char *path, aq_error *err) {
    char *p = out;
    while (size > 0) {
        ssize_t n = pread(fd, p, size < (1u << 30) ? (size_t)size : 1u << 30, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return aq_fail_io(err, errno, path, "cannot read at byte %llu", (unsigned long long)offset);
        if (n == 0) {
            aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "ends at byte %llu, %llu bytes earlier than expected: it changed during read",
                       (unsigned long long)offset, (unsigned long long)size);
            return AQ_ERR_FORMAT;
        }
        p += n;
        size -= (uint64_t)n;
        offset += (uint64_t)n;
    }
    return AQ_OK;
}

aq_status aq_file_read(char **out, uint64_t *size, const char *path, uint64_t limit, aq_error *err) {
    int fd;
    struct stat st;
    aq_status status = open_regular(&fd, &st, path, false, err);
    if (status != AQ_OK) return status;
    uint64_t n = (uint64_t)st.st_size;
    char *text = NULL;
    if (n > limit) {
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is %llu bytes, over the limit of %llu", (unsigned long long)n, (unsigned long long)limit);
    } else if (!(text = aq_alloc(n + 1))) {
        status = aq_fail_memory(err, n + 1, path);
    } else {
        status = aq_file_pread(fd, text, n, 0, path, err);
    }
    close(fd);
    if (status != AQ_OK) {
        aq_free(text);
        return status;
    }
    text[n] = 0;
    *out = text;
    if (size) *size = n;
    return AQ_OK;
}

aq_status aq_fd_write(int fd, const void *data, uint64_t size, const char *path, aq_error *err) {
    const char *p = data;
    while (size > 0) {
        ssize_t n = write(fd, p, size < (1u << 30) ? (size_t)size : 1u << 30);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n <= 0) return aq_fail_io(err, n < 0 ? errno : ENOSPC, path, "cannot write");
        p += n;
        size -= (uint64_t)n;
    }
    return AQ_OK;
}

aq_status aq_fsync_path(const char *path, aq_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return aq_fail_io(err, errno, path, "cannot open for sync");
    int failed = fsync(fd), e = errno;
    close(fd);
    /* Some file systems cannot sync a folder: EINVAL is their answer, and there is nothing more to do then. */
    return failed && e != EINVAL ? aq_fail_io(err, e, path, "cannot sync") : AQ_OK;
}

aq_status aq_file_write(const char *path, const void *data, uint64_t size, aq_error *err) {
    size_t n = strlen(path) + 24;
    char *temp = aq_alloc(n), *dir = aq_path_dirname(path);
    aq_status status = AQ_OK;
    int fd = -1;
    if (!temp || !dir) {
        status = aq_fail_memory(err, n, "a path");
        goto done;
    }
    snprintf(temp, n, "%s.tmp-%ld", path, (long)getpid());
    fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        status = aq_fail_io(err, errno, path, "cannot create");
        goto done;
    }
    status = aq_fd_write(fd, data, size, path, err);
    if (status == AQ_OK && fsync(fd) != 0) status = aq_fail_io(err, errno, path, "cannot sync");
    if (close(fd) != 0 && status == AQ_OK) status = aq_fail_io(err, errno, path, "cannot close");
    if (status == AQ_OK && rename(temp, path) != 0) status = aq_fail_io(err, errno, path, "cannot rename into place");
    if (status != AQ_OK) unlink(temp);
    if (status == AQ_OK) status = aq_fsync_path(dir, err);
done:
    aq_free(temp);
    aq_free(dir);
    return status;
}

aq_status aq_file_copy(const char *from, const char *to, aq_error *err) { return aq_file_copy_while(from, to, NULL, NULL, err); }

aq_status aq_file_copy_while(const char *from, const char *to, bool (*keep_going)(void *user), void *user, aq_error *err) {
    enum { CHUNK = 1 << 20 };
    int in, out = -1;
    struct stat st;
    aq_status status = open_regular(&in, &st, from, false, err);
    if (status != AQ_OK) return status;
    char *chunk = aq_alloc(CHUNK);
    if (!chunk) status = aq_fail_memory(err, CHUNK, "copying");
    if (status == AQ_OK && (out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) < 0) status = aq_fail_io(err, errno, to, "cannot create");
    while (status == AQ_OK) {
        ssize_t n = read(in, chunk, CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) status = aq_fail_io(err, errno, from, "cannot read");
        if (n <= 0) break;
        status = aq_fd_write(out, chunk, (uint64_t)n, to, err);
        if (status == AQ_OK && keep_going && !keep_going(user)) status = aq_fail(err, AQ_ERR_INTERRUPTED, "interrupted");
    }
    if (status == AQ_OK && fsync(out) != 0) status = aq_fail_io(err, errno, to, "cannot sync");
    if (out >= 0 && close(out) != 0 && status == AQ_OK) status = aq_fail_io(err, errno, to, "cannot close");
    close(in);
    aq_free(chunk);
    return status;
}

bool aq_path_exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

bool aq_path_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool aq_path_is_file(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool aq_path_same(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

char *aq_path_join(const char *dir, const char *name) {
    size_t a = strlen(dir), b = strlen(name);
    char *path = aq_alloc(a + b + 2);
    if (!path) return NULL;
    memcpy(path, dir, a);
    if (a > 0 && dir[a - 1] != '/') path[a++] = '/';
    memcpy(path + a, name, b + 1);
    return path;
}

/* End of the path without trailing slashes; "/" stays. */
static size_t trimmed_length(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    return n;
}

static char *copy_n(const char *text, size_t n) {
    char *copy = aq_alloc(n + 1);
    if (!copy) return NULL;
    memcpy(copy, text, n);
    copy[n] = 0;
    return copy;
}

char *aq_path_dirname(const char *path) {
    size_t n = trimmed_length(path);
    while (n > 0 && path[n - 1] != '/') n--;
    if (n == 0) return aq_strdup(".");
    while (n > 1 && path[n - 1] == '/') n--;
    return copy_n(path, n);
}

char *aq_path_basename(const char *path) {
    size_t n = trimmed_length(path), begin = n;
    while (begin > 0 && path[begin - 1] != '/') begin--;
    return begin == n ? copy_n(path, n) : copy_n(path + begin, n - begin);
}

bool aq_path_is_inside(const char *inner, const char *outer) {
    char *at = aq_strdup(inner), *real = NULL;
    while (at && !(real = realpath(at, NULL))) {
        char *up = aq_path_dirname(at);
        bool stuck = !up || strcmp(up, at) == 0;
        aq_free(at);
        at = up;
        if (stuck) break;
    }
    aq_free(at);
    bool inside = false;
    while (real && !inside) { /* the path, its parent, … the root */
        inside = aq_path_same(*real ? real : "/", outer);
        char *slash = strrchr(real, '/');
        if (!slash) break;
        *slash = 0;
    }
    free(real);
    return inside;
}

bool aq_text_ends_with(const char *text, const char *suffix) {
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && memcmp(text + n - m, suffix, m) == 0;
}

aq_status aq_make_dirs(const char *path, aq_error *err) {
    if (aq_path_is_dir(path)) return AQ_OK;
    char *dir = aq_path_dirname(path);
    if (!dir) return aq_fail_memory(err, strlen(path), "a path");
    aq_status status = strcmp(dir, path) == 0 ? AQ_OK : aq_make_dirs(dir, err);
    aq_free(dir);
    if (status == AQ_OK && mkdir(path, 0777) != 0 && !(errno == EEXIST && aq_path_is_dir(path)))
        status = aq_fail_io(err, errno, path, "cannot create the folder");
    return status;
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

aq_status aq_list_dir(aq_names *out, const char *path, uint64_t limit, aq_error *err) {
    memset(out, 0, sizeof *out);
    DIR *dir = opendir(path);
    if (!dir) return aq_fail_io(err, errno, path, "cannot list the folder");
    aq_status status = AQ_OK;
    size_t capacity = 0;
    for (struct dirent *entry; status == AQ_OK && (entry = readdir(dir)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (out->n_names >= limit) {
            status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "holds more than %llu files", (unsigned long long)limit);
            break;
        }
        if (out->n_names == capacity) {
            size_t larger = capacity ? capacity * 2 : 32;
            char **names = aq_realloc(out->names, larger, sizeof *names);
            if (!names) {
                status = aq_fail_memory(err, larger * sizeof *names, "a folder listing");
                break;
            }
            out->names = names;
            capacity = larger;
        }
        if (!(out->names[out->n_names] = aq_strdup(entry->d_name)))
            status = aq_fail_memory(err, sizeof entry->d_name, "a folder listing");
        else
            out->n_names++;
    }
    closedir(dir);
    if (status != AQ_OK)
        aq_names_free(out);
    else if (out->n_names > 1)
        qsort(out->names, out->n_names, sizeof *out->names, compare_names);
    return status;
}

void aq_names_free(aq_names *names) {
    for (size_t i = 0; i < names->n_names; i++) aq_free(names->names[i]);
    aq_free(names->names);
    memset(names, 0, sizeof *names);
}

aq_status aq_remove_tree(const char *path, aq_error *err) {
    struct stat st;
    if (lstat(path, &st) != 0) return errno == ENOENT ? AQ_OK : aq_fail_io(err, errno, path, "cannot remove");
    if (!S_ISDIR(st.st_mode)) return unlink(path) == 0 ? AQ_OK : aq_fail_io(err, errno, path, "cannot remove");
    aq_names names;
    aq_status status = aq_list_dir(&names, path, UINT64_MAX, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < names.n_names && status == AQ_OK; i++) {
        char *child = aq_path_join(path, names.names[i]);
        status = child ? aq_remove_tree(child, err) : aq_fail_memory(err, strlen(path), "a path");
        aq_free(child);
    }
    aq_names_free(&names);
    if (status == AQ_OK && rmdir(path) != 0) status = aq_fail_io(err, errno, path, "cannot remove");
    return status;
}

static void to_hex(const unsigned char *bytes, size_t n, char *out) {
    for (size_t i = 0; i < n; i++) snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

aq_status aq_file_sha256(const char *path, char out[65], aq_error *err) { return aq_file_sha256_while(path, out, NULL, NULL, err); }

aq_status aq_file_sha256_while(const char *path, char out[65], bool (*keep_going)(void *user), void *user, aq_error *err) {
    enum { CHUNK = 1 << 20 };
    int fd;
    struct stat st;
    aq_status status = open_regular(&fd, &st, path, false, err);
    if (status != AQ_OK) return status;
    unsigned char *chunk = aq_alloc(CHUNK), digest[32];
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    if (!chunk || !ctx || !EVP_DigestInit_ex(ctx, EVP_sha256(), NULL)) status = aq_fail_memory(err, CHUNK, "hashing");
    while (status == AQ_OK) {
        ssize_t n = read(fd, chunk, CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) status = aq_fail_io(err, errno, path, "cannot read");
        if (n <= 0) break;
        EVP_DigestUpdate(ctx, chunk, (size_t)n);
        if (keep_going && !keep_going(user)) status = aq_fail(err, AQ_ERR_INTERRUPTED, "interrupted");
    }
    if (status == AQ_OK) {
        EVP_DigestFinal_ex(ctx, digest, NULL);
        to_hex(digest, sizeof digest, out);
    }
    EVP_MD_CTX_free(ctx);
    aq_free(chunk);
    close(fd);
    return status;
}

void aq_sha256_hex(const void *data, uint64_t size, char out[65]) {
    unsigned char digest[32] = {0};
    EVP_Digest(data, (size_t)size, digest, NULL, EVP_sha256(), NULL);
    to_hex(digest, sizeof digest, out);
}

void aq_xxh3_hex(const void *data, uint64_t size, char out[33]) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, (size_t)size));
    to_hex(canonical.digest, sizeof canonical.digest, out);
}

double aq_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint64_t aq_rss_bytes(void) {
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long long total = 0, resident = 0;
    if (!f) return 0;
    if (fscanf(f, "%llu %llu", &total, &resident) != 2) resident = 0;
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* First number in a small system file; false when it is not there or holds a word ("max"). */
static bool read_number(const char *path, const char *key, uint64_t *out) {
    FILE *f = fopen(path, "r");
    if (!f) return false;
    char line[256];
    bool found = false;
    while (!found && fgets(line, sizeof line, f)) {
        unsigned long long value;
        size_t skip = key ? strlen(key) : 0;
        found = (!key || strncmp(line, key, skip) == 0) && sscanf(line + skip, "%llu", &value) == 1;
        if (found) *out = value;
        if (!key) break;
    }
    fclose(f);
    return found;
}

uint64_t aq_available_memory_bytes(void) {
    uint64_t available, limit, current;
    if (!read_number("/proc/meminfo", "MemAvailable:", &available)) return 0;
    available *= 1024;
    if (read_number("/sys/fs/cgroup/memory.max", NULL, &limit) && read_number("/sys/fs/cgroup/memory.current", NULL, &current)) {
        uint64_t left = limit > current ? limit - current : 0;
        if (left < available) available = left;
    }
    return available;
}

uint64_t aq_peak_rss_bytes(void) {
    uint64_t kilobytes;
    /* Of this program's own memory; getrusage also counts what the process that started it shared before exec. */
    if (read_number("/proc/self/status", "VmHWM:", &kilobytes)) return kilobytes * 1024;
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
    return (uint64_t)usage.ru_maxrss * 1024;
}

/* Files: guarded opening, memory maps, whole reads under a limit, atomic writes, hashes, paths. */
#ifndef AQ_BASE_FILE_H
#define AQ_BASE_FILE_H

#include <arrowquant/base.h>

#include <stdio.h>

/* A read-only map of a regular file. */
typedef struct aq_file_map {
    const uint8_t *data; /* NULL for an empty file */
    uint64_t size;
    int64_t mtime_ns;
    int fd;
} aq_file_map;

/* Opens without blocking, refuses what is not a regular file (IX03) and, when no_follow, symbolic links. */
aq_status aq_file_map_open(aq_file_map *out, const char *path, bool no_follow, aq_error *err);
void aq_file_map_close(aq_file_map *map);
/* Drops resident pages of [offset, offset + size): the next access reads the file again. */
void aq_file_map_release(const aq_file_map *map, uint64_t offset, uint64_t size);
/* Opens a regular file for reading, as guarded as a map. */
aq_status aq_file_open(int *fd, uint64_t *size, const char *path, aq_error *err);
/* pread of exactly `size` bytes, EINTR and short reads handled. */
aq_status aq_file_pread(int fd, void *out, uint64_t size, uint64_t offset, const char *path, aq_error *err);

/* Reads a whole regular file of at most `limit` bytes; text is terminated by a NUL that is not counted. Freed by aq_free. */
aq_status aq_file_read(char **out, uint64_t *size, const char *path, uint64_t limit, aq_error *err);
/* Writes beside the target, syncs, renames, syncs the folder. */
aq_status aq_file_write(const char *path, const void *data, uint64_t size, aq_error *err);
aq_status aq_file_copy(const char *from, const char *to, aq_error *err);
/* The same, asking keep_going (may be NULL) after every MiB: false ends it with AQ_ERR_INTERRUPTED and leaves a part. */
aq_status aq_file_copy_while(const char *from, const char *to, bool (*keep_going)(void *user), void *user, aq_error *err);
aq_status aq_fsync_path(const char *path, aq_error *err);
/* write(2) of everything. */
aq_status aq_fd_write(int fd, const void *data, uint64_t size, const char *path, aq_error *err);

bool aq_path_exists(const char *path); /* without following a link at the end */
bool aq_path_is_dir(const char *path);
bool aq_path_is_file(const char *path);
/* Same file or folder by device and inode; false when either is missing. */
bool aq_path_same(const char *a, const char *b);
/* True when `inner` (which need not exist) is `outer` or lies inside it. The nearest existing folder of `inner` is resolved, so that links do not hide it. */
bool aq_path_is_inside(const char *inner, const char *outer);
/* Joined path, aq_free. NULL: no memory. */
char *aq_path_join(const char *dir, const char *name);
/* Folder part ("." when there is none) and last component (without trailing slashes), aq_free. */
char *aq_path_dirname(const char *path);
char *aq_path_basename(const char *path);
bool aq_text_ends_with(const char *text, const char *suffix);
/* Creates a folder and its parents. */
aq_status aq_make_dirs(const char *path, aq_error *err);
/* Removes a tree without following links. Missing is fine. */
aq_status aq_remove_tree(const char *path, aq_error *err);

/* Names in a folder (not . and ..), sorted bytewise. Freed by aq_names_free. */
typedef struct aq_names {
    char **names;
    size_t n_names;
} aq_names;
aq_status aq_list_dir(aq_names *out, const char *path, uint64_t limit, aq_error *err);
void aq_names_free(aq_names *names);

/* Fuzz targets try what lies behind the hashes: what a hostile writer could do with right ones. */
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
enum { AQ_HASHES_IGNORED = 1 };
#else
enum { AQ_HASHES_IGNORED = 0 };
#endif

/* SHA-256 of a file as 64 hex digits + NUL. */
aq_status aq_file_sha256(const char *path, char out[65], aq_error *err);
/* The same, asking keep_going (may be NULL) after every MiB: false ends it with AQ_ERR_INTERRUPTED. */
aq_status aq_file_sha256_while(const char *path, char out[65], bool (*keep_going)(void *user), void *user, aq_error *err);
void aq_sha256_hex(const void *data, uint64_t size, char out[65]);
/* XXH3-128 as 32 hex digits + NUL. */
void aq_xxh3_hex(const void *data, uint64_t size, char out[33]);

/* Monotonic seconds; resident bytes of this process now and at most (0 where unknown). */
double aq_now_s(void);
uint64_t aq_rss_bytes(void);
uint64_t aq_peak_rss_bytes(void);
/* Memory that can still be had without swapping, the control group's limit included (0 where unknown). */
uint64_t aq_available_memory_bytes(void);

#endif

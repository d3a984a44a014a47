/* See outfile.h. */
#include "store/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"

struct aq_outfile {
    char *path, *temp;
    int fd;
    bool overwrite, exists; /* exists: the temporary file does */
    uint64_t size;
};

static aq_status fail_exists(const char *path, aq_error *err) {
    bool is_dir = aq_path_is_dir(path);
    aq_fail_at(err, AQ_ERR_IO, path, NULL, is_dir ? "is a folder" : "exists already");
    if (err) err->os_errno = is_dir ? EISDIR : EEXIST;
    aq_hint(err, is_dir ? "choose another output" : "choose another output, or add --overwrite");
    return AQ_ERR_IO;
}

aq_status aq_outfile_create(aq_outfile **out, const char *path, uint64_t size_bytes, bool overwrite, aq_error *err) {
    *out = NULL;
    if (aq_path_exists(path) && (!overwrite || aq_path_is_dir(path))) return fail_exists(path, err);
    if (size_bytes > INT64_MAX) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "its size would not fit 63 bits");
    aq_outfile *f = aq_calloc(1, sizeof *f);
    size_t n = strlen(path) + 40;
    if (!f) return aq_fail_memory(err, sizeof *f, "a file");
    f->fd = -1;
    f->overwrite = overwrite;
    f->size = size_bytes;
    f->path = aq_strdup(path);
    f->temp = aq_alloc(n);
    aq_status status = f->path && f->temp ? AQ_OK : aq_fail_memory(err, n, "a path");
    if (status == AQ_OK) {
        snprintf(f->temp, n, "%s.partial-%ld", path, (long)getpid());
        f->fd = open(f->temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        f->exists = f->fd >= 0;
        if (f->fd < 0) status = aq_fail_io(err, errno, path, "cannot create");
    }
    if (status == AQ_OK && ftruncate(f->fd, (off_t)size_bytes) != 0) status = aq_fail_io(err, errno, path, "cannot make room for it");
    if (status == AQ_OK)
        *out = f;
    else
        aq_outfile_abort(f);
    return status;
}

aq_status aq_outfile_write(aq_outfile *f, uint64_t offset, const void *data, uint64_t size_bytes, aq_error *err) {
    if (offset > f->size || size_bytes > f->size - offset)
        return aq_fail_at(err, AQ_ERR_INTERNAL, f->path, NULL, "bytes %llu + %llu are beyond its end", (unsigned long long)offset,
                          (unsigned long long)size_bytes);
    const char *p = data;
    while (size_bytes > 0) {
        ssize_t n = pwrite(f->fd, p, size_bytes < (1u << 30) ? (size_t)size_bytes : 1u << 30, (off_t)offset);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n <= 0) return aq_fail_io(err, n < 0 ? errno : ENOSPC, f->path, "cannot write");
        p += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return AQ_OK;
}

/* Without --overwrite, a file that appeared meanwhile is not replaced. */
static aq_status move_into_place(aq_outfile *f, aq_error *err) {
    if (!f->overwrite) {
        if (renameat2(AT_FDCWD, f->temp, AT_FDCWD, f->path, RENAME_NOREPLACE) == 0) return AQ_OK;
        if (errno == EEXIST) return aq_fail_at(err, AQ_ERR_IO, f->path, NULL, "exists already: it was created while this run worked");
    }
    return rename(f->temp, f->path) == 0 ? AQ_OK : aq_fail_io(err, errno, f->path, "cannot rename into place");
}

aq_status aq_outfile_finish(aq_outfile *f, aq_error *err) {
    char *dir = aq_path_dirname(f->path);
    aq_status status = dir ? AQ_OK : aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK && fsync(f->fd) != 0) status = aq_fail_io(err, errno, f->path, "cannot sync");
    int fd = f->fd;
    f->fd = -1;
    if (close(fd) != 0 && status == AQ_OK) status = aq_fail_io(err, errno, f->path, "cannot close");
    if (status == AQ_OK) status = move_into_place(f, err);
    if (status == AQ_OK) {
        f->exists = false;
        status = aq_fsync_path(dir, err);
    }
    aq_free(dir);
    aq_outfile_abort(f);
    return status;
}

void aq_outfile_abort(aq_outfile *f) {
    if (!f) return;
    if (f->fd >= 0) close(f->fd);
    if (f->exists && f->temp) unlink(f->temp);
    aq_free(f->path);
    aq_free(f->temp);
    aq_free(f);
}

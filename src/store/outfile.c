/* See outfile.h. */
#include "store/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "base/draft.h"
#include "base/mem.h"

struct aq_outfile {
    aq_draft draft;
    int fd;
    uint64_t size;
};

aq_status aq_outfile_create(aq_outfile **out, const char *path, uint64_t size_bytes, bool overwrite, aq_error *err) {
    *out = NULL;
    aq_outfile *f = aq_calloc(1, sizeof *f);
    if (!f) return aq_fail_memory(err, sizeof *f, "a file");
    f->fd = -1;
    f->size = size_bytes;
    aq_status status = aq_draft_begin(&f->draft, path, overwrite, err);
    if (status == AQ_OK && size_bytes > INT64_MAX) status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "its size would not fit 63 bits");
    if (status == AQ_OK && (f->fd = open(f->draft.temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) < 0)
        status = aq_fail_io(err, errno, path, "cannot create");
    if (status == AQ_OK && ftruncate(f->fd, (off_t)size_bytes) != 0) status = aq_fail_io(err, errno, path, "cannot make room for it");
    if (status == AQ_OK)
        *out = f;
    else
        aq_outfile_abort(f);
    return status;
}

aq_status aq_outfile_write(aq_outfile *f, uint64_t offset, const void *data, uint64_t size_bytes, aq_error *err) {
    if (offset > f->size || size_bytes > f->size - offset)
        return aq_fail_at(err, AQ_ERR_INTERNAL, f->draft.path, NULL, "bytes %llu + %llu are beyond its end", (unsigned long long)offset,
                          (unsigned long long)size_bytes);
    const char *p = data;
    while (size_bytes > 0) {
        ssize_t n = pwrite(f->fd, p, size_bytes < (1u << 30) ? (size_t)size_bytes : 1u << 30, (off_t)offset);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n <= 0) return aq_fail_io(err, n < 0 ? errno : ENOSPC, f->draft.path, "cannot write");
        p += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return AQ_OK;
}

aq_status aq_outfile_finish(aq_outfile *f, aq_error *err) {
    int fd = f->fd;
    f->fd = -1;
    aq_status status = close(fd) == 0 ? aq_draft_commit(&f->draft, err) : aq_fail_io(err, errno, f->draft.path, "cannot close");
    aq_outfile_abort(f);
    return status;
}

void aq_outfile_abort(aq_outfile *f) {
    if (!f) return;
    if (f->fd >= 0) close(f->fd);
    aq_draft_end(&f->draft);
    aq_free(f);
}

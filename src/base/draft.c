/* Drafts (see draft.h). */
#include "base/draft.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"

static aq_status check_folder(const char *path, aq_error *err) {
    char *folder = aq_path_dirname(path);
    if (!folder) return aq_fail_memory(err, strlen(path), "a path");
    aq_status status = AQ_OK;
    if (!aq_path_exists(folder)) {
        status = aq_fail_at(err, AQ_ERR_IO, folder, NULL, "the folder for the output does not exist");
        if (err) err->os_errno = ENOENT;
        aq_hint(err, "create it first");
    } else if (!aq_path_is_dir(folder)) {
        status = aq_fail_at(err, AQ_ERR_IO, folder, NULL, "is no folder, so that nothing can be written in it");
        if (err) err->os_errno = ENOTDIR;
    }
    aq_free(folder);
    return status;
}

aq_status aq_draft_check(const char *path, bool overwrite, aq_error *err) {
    bool is_dir = aq_path_is_dir(path);
    if (!aq_path_exists(path)) return check_folder(path, err);
    if (overwrite && !is_dir) return AQ_OK;
    aq_fail_at(err, AQ_ERR_IO, path, NULL, is_dir ? "is a folder" : "exists already");
    if (err) err->os_errno = is_dir ? EISDIR : EEXIST;
    aq_hint(err, is_dir ? "choose another output" : "choose another output, or add --overwrite");
    return AQ_ERR_IO;
}

aq_status aq_draft_begin(aq_draft *d, const char *path, bool overwrite, aq_error *err) {
    memset(d, 0, sizeof *d);
    aq_status status = aq_draft_check(path, overwrite, err);
    if (status != AQ_OK) return status;
    size_t size = strlen(path) + 40;
    d->overwrite = overwrite;
    d->path = aq_strdup(path);
    d->temp = aq_alloc(size);
    if (!d->path || !d->temp) {
        aq_draft_end(d);
        return aq_fail_memory(err, size, "a path");
    }
    snprintf(d->temp, size, "%s.partial-%ld", path, (long)getpid());
    return AQ_OK;
}

static aq_status give_name(const aq_draft *d, aq_error *err) {
    if (!d->overwrite) {
        if (renameat2(AT_FDCWD, d->temp, AT_FDCWD, d->path, RENAME_NOREPLACE) == 0) return AQ_OK;
        if (errno == EEXIST) return aq_fail_at(err, AQ_ERR_IO, d->path, NULL, "exists already: it was created while this run worked");
    }
    return rename(d->temp, d->path) == 0 ? AQ_OK : aq_fail_io(err, errno, d->path, "cannot rename into place");
}

aq_status aq_draft_commit(aq_draft *d, aq_error *err) {
    aq_status status = aq_fsync_path(d->temp, err);
    if (status == AQ_OK) status = give_name(d, err);
    if (status != AQ_OK) return status;
    d->temp[0] = 0; /* no longer there under that name */
    char *dir = aq_path_dirname(d->path);
    status = dir ? aq_fsync_path(dir, err) : aq_fail_memory(err, 1, "a path");
    aq_free(dir);
    return status;
}

void aq_draft_end(aq_draft *d) {
    if (d->temp && d->temp[0]) unlink(d->temp);
    aq_free(d->temp);
    aq_free(d->path);
    memset(d, 0, sizeof *d);
}

/* The work folder (see workdir.h). A lock is a file with process id, host and boot id, held by flock as well: the ids tell a run on another machine of
 * a shared file system, flock tells a process that was given a dead one's number. */
#include "store/workdir.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

static void step(const char *what) {
    if (aq_store_step) aq_store_step(what);
}

static void boot_id(char out[64]) {
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f || !fgets(out, 64, f)) snprintf(out, 64, "unknown");
    if (f) fclose(f);
    out[strcspn(out, "\n")] = 0;
}

static void host_name(char out[256]) {
    if (gethostname(out, 256) != 0) snprintf(out, 256, "unknown");
    out[255] = 0;
}

/* Takes the lock of a work folder. *live: another run holds it; `who` names it. */
static aq_status take_lock(int *fd, const char *dir, bool *live, char who[320], aq_error *err) {
    char *path = aq_path_join(dir, "lock");
    aq_status status = AQ_OK;
    char text[512] = "", boot[64], host[256];
    *live = false;
    *fd = -1;
    if (!path) return aq_fail_memory(err, strlen(dir), "a path");
    boot_id(boot);
    host_name(host);
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock < 0) {
        status = aq_fail_io(err, errno, path, "cannot open");
        goto done;
    }
    bool held = flock(lock, LOCK_EX | LOCK_NB) != 0, flock_works = !held || errno == EWOULDBLOCK;
    held = held && flock_works;
    ssize_t n = pread(lock, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    json_t *owner = NULL;
    long long pid = 0;
    const char *their_host = "", *their_boot = "";
    if (n > 0 && aq_json_parse(&owner, text, (uint64_t)n, 4, path, NULL) == AQ_OK) {
        pid = json_integer_value(json_object_get(owner, "pid"));
        if (json_string_value(json_object_get(owner, "host"))) their_host = json_string_value(json_object_get(owner, "host"));
        if (json_string_value(json_object_get(owner, "boot_id"))) their_boot = json_string_value(json_object_get(owner, "boot_id"));
    }
    if (held) {
        *live = true;
    } else if (pid > 0 && strcmp(their_host, host) != 0) {
        *live = true; /* another machine: nobody here can tell whether it still runs */
    } else if (pid > 0 && !flock_works && strcmp(their_boot, boot) == 0) {
        *live = kill((pid_t)pid, 0) == 0 || errno == EPERM;
    }
    if (*live) {
        char shown[128];
        snprintf(who, 320, "process %lld on %s", pid, aq_escape(shown, sizeof shown, their_host, strlen(their_host)));
    }
    json_decref(owner);
    if (!*live) {
        json_t *mine = json_pack("{s:I, s:s, s:s}", "pid", (json_int_t)getpid(), "host", host, "boot_id", boot);
        char *dump = mine ? json_dumps(mine, JSON_COMPACT) : NULL;
        json_decref(mine);
        if (!dump || ftruncate(lock, 0) != 0 || pwrite(lock, dump, strlen(dump), 0) != (ssize_t)strlen(dump))
            status = aq_fail_io(err, errno ? errno : ENOMEM, path, "cannot write");
        free(dump);
    }
done:
    aq_free(path);
    if (lock >= 0 && (*live || status != AQ_OK))
        close(lock);
    else
        *fd = lock;
    return status;
}

static aq_status fail_live(aq_error *err, const char *target, const char *who) {
    aq_fail_at(err, AQ_ERR_IO, target, NULL, "another run is writing it (%s)", who);
    aq_hint(err, "wait for it, or choose another output");
    return AQ_ERR_IO;
}

/* Names the work folders of this target in `parent`. */
static aq_status list_work(aq_names *out, const aq_workdir *dir, aq_error *err) {
    char *base = aq_path_basename(dir->target);
    if (!base) return aq_fail_memory(err, 1, "a path");
    aq_status status = aq_list_dir(out, dir->parent, 10000000, err);
    size_t kept = 0, n = strlen(base);
    for (size_t i = 0; status == AQ_OK && i < out->n_names; i++) {
        const char *name = out->names[i];
        bool ours =
            strncmp(name, base, n) == 0 && strncmp(name + n, ".partial-", 9) == 0 && name[n + 9] && strspn(name + n + 9, "0123456789") == strlen(name + n + 9);
        if (ours) {
            char *swap = out->names[kept];
            out->names[kept++] = out->names[i];
            out->names[i] = swap;
        }
    }
    for (size_t i = kept; status == AQ_OK && i < out->n_names; i++) aq_free(out->names[i]);
    if (status == AQ_OK) out->n_names = kept;
    aq_free(base);
    return status;
}

/* SHA-256 of DIR/metadata.json equals the recorded one. */
static bool is_final(const char *dir, const char *sha256) {
    char *path = aq_path_join(dir, "metadata.json"), found[65];
    bool same = path && aq_path_is_file(path) && aq_file_sha256(path, found, NULL) == AQ_OK && strcmp(found, sha256) == 0;
    aq_free(path);
    return same;
}

/* Looks at one leftover folder: a live run fails; a dead one is taken over, discarded, or refused. On adoption dir->path is set and the lock is held. */
static aq_status consider(aq_workdir *dir, aq_journal *journal, char *path, const char *fingerprint, bool restart, aq_error *err) {
    bool live = false, empty = true;
    char who[320];
    int lock;
    if (!aq_path_is_dir(path)) return AQ_OK;
    aq_status status = take_lock(&lock, path, &live, who, err);
    if (status != AQ_OK) return status;
    if (live) return fail_live(err, dir->target, who);
    aq_journal found = {.fd = -1};
    char *journal_path = aq_path_join(path, "journal"), *out = aq_path_join(path, "out");
    if (!journal_path || !out) status = aq_fail_memory(err, strlen(path), "a path");
    if (status == AQ_OK && !restart) status = aq_journal_open(&found, journal_path, &empty, err);
    bool discard = false;
    if (status == AQ_OK) {
        /* Killed between the rename and the cleaning up: out/ is gone or holds the replaced model. */
        bool finished = found.final_sha256[0] && !is_final(out, found.final_sha256) && is_final(dir->target, found.final_sha256);
        discard = restart || empty || finished || !aq_path_is_dir(out);
        if (!discard && strcmp(found.fingerprint, fingerprint) != 0) {
            status =
                aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "an interrupted run left its state here, made from another input, other options or another version");
            aq_hint(err, "repeat that run's command to finish it, or add --restart to discard its state");
        } else if (!discard && dir->path) {
            discard = true; /* a second one for the same work: the first is continued */
        }
    }
    if (status == AQ_OK && discard) status = aq_remove_tree(path, err);
    if (status == AQ_OK && !discard) {
        *journal = found;
        dir->lock_fd = lock;
        dir->path = path;
        dir->resumed = true;
    } else {
        aq_journal_close(&found);
        close(lock);
    }
    aq_free(journal_path);
    aq_free(out);
    return status;
}

static aq_status look_for_leftovers(aq_workdir *dir, aq_journal *journal, const char *fingerprint, bool restart, aq_error *err) {
    aq_names names = {0};
    aq_status status = list_work(&names, dir, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; status == AQ_OK && i < names.n_names; i++) {
        char *path = aq_path_join(dir->parent, names.names[i]);
        status = path ? consider(dir, journal, path, fingerprint, restart, err) : aq_fail_memory(err, 1, "a path");
        if (path != dir->path) aq_free(path);
    }
    aq_names_free(&names);
    return status;
}

/* Other live work folders than ours: two runs that started at the same moment both see the other. */
static aq_status refuse_rivals(const aq_workdir *dir, aq_error *err) {
    aq_names names = {0};
    aq_status status = list_work(&names, dir, err);
    for (size_t i = 0; status == AQ_OK && i < names.n_names; i++) {
        char *path = aq_path_join(dir->parent, names.names[i]), who[320];
        bool live = false;
        int lock = -1;
        if (!path) status = aq_fail_memory(err, 1, "a path");
        if (status == AQ_OK && !aq_path_same(path, dir->path) && aq_path_is_dir(path)) {
            status = take_lock(&lock, path, &live, who, err);
            if (status == AQ_OK && live) status = fail_live(err, dir->target, who);
        }
        if (lock >= 0) close(lock);
        aq_free(path);
    }
    aq_names_free(&names);
    return status;
}

static char *own_path(const aq_workdir *dir) {
    size_t n = strlen(dir->target) + 40;
    char *path = aq_alloc(n);
    if (path) snprintf(path, n, "%s.partial-%ld", dir->target, (long)getpid());
    return path;
}

static aq_status create_work(aq_workdir *dir, aq_journal *journal, const char *fingerprint, aq_error *err) {
    bool live;
    char who[320], *journal_path = NULL;
    dir->path = own_path(dir);
    if (!dir->path) return aq_fail_memory(err, 1, "a path");
    if (mkdir(dir->path, 0700) != 0) return aq_fail_io(err, errno, dir->target, "cannot create the work folder %s", dir->path);
    step("work folder");
    aq_status status = take_lock(&dir->lock_fd, dir->path, &live, who, err);
    if (status == AQ_OK && live) status = fail_live(err, dir->target, who);
    step("lock");
    if (status == AQ_OK) status = refuse_rivals(dir, err);
    dir->out = aq_path_join(dir->path, "out");
    journal_path = aq_path_join(dir->path, "journal");
    if (status == AQ_OK && (!dir->out || !journal_path)) status = aq_fail_memory(err, 1, "a path");
    /* The target gets the permissions that mkdir would give it, whatever the work folder has. */
    if (status == AQ_OK && dir->out && mkdir(dir->out, 0777) != 0) status = aq_fail_io(err, errno, dir->out, "cannot create");
    if (status == AQ_OK) status = aq_journal_create(journal, journal_path, fingerprint, err);
    if (status == AQ_OK) status = aq_fsync_path(dir->path, err);
    aq_free(journal_path);
    return status;
}

/* Gives an adopted folder our process id. */
static aq_status adopt(aq_workdir *dir, aq_journal *journal, aq_error *err) {
    char *mine = own_path(dir);
    if (!mine) return aq_fail_memory(err, 1, "a path");
    if (strcmp(mine, dir->path) != 0) {
        if (rename(dir->path, mine) != 0) {
            aq_status status = aq_fail_io(err, errno, dir->path, "cannot adopt the interrupted run");
            aq_free(mine);
            return status;
        }
        step("adopted");
        aq_free(dir->path);
        dir->path = mine;
        aq_free(journal->path);
        journal->path = aq_path_join(mine, "journal");
    } else {
        aq_free(mine);
    }
    dir->out = aq_path_join(dir->path, "out");
    return dir->out && journal->path ? AQ_OK : aq_fail_memory(err, 1, "a path");
}

static aq_status check_target(const aq_workdir *dir, bool overwrite, bool make_parents, aq_error *err) {
    if (!aq_path_is_dir(dir->parent)) {
        if (aq_path_exists(dir->parent)) return aq_fail_at(err, AQ_ERR_IO, dir->parent, NULL, "is no folder, so that nothing can be written in it");
        if (make_parents) return aq_make_dirs(dir->parent, err);
        aq_fail_at(err, AQ_ERR_IO, dir->parent, NULL, "the folder for the output does not exist");
        if (err) err->os_errno = ENOENT;
        aq_hint(err, "create it, or add --mkdir");
        return AQ_ERR_IO;
    }
    if (!aq_path_exists(dir->target)) return AQ_OK;
    if (!overwrite) {
        aq_fail_at(err, AQ_ERR_IO, dir->target, NULL, "exists already");
        if (err) err->os_errno = EEXIST;
        aq_hint(err, "choose another output, or add --overwrite to replace it when the new one is complete");
        return AQ_ERR_IO;
    }
    /* Only what this program wrote is ever replaced: a wrong path must not cost a home folder. */
    if (aq_path_is_dir(dir->target) && aq_store_is_container(dir->target)) return AQ_OK;
    aq_names names = {0};
    if (aq_path_is_dir(dir->target) && aq_list_dir(&names, dir->target, 1000000, NULL) == AQ_OK) {
        bool empty = names.n_names == 0;
        aq_names_free(&names);
        if (empty) return AQ_OK;
    }
    aq_fail_at(err, AQ_ERR_IO, dir->target, NULL, "is no quantized model folder and is not replaced");
    aq_hint(err, "choose another output, or remove it yourself");
    return AQ_ERR_IO;
}

aq_status aq_workdir_open(aq_workdir *dir, aq_journal *journal, const char *target, const char *fingerprint, bool overwrite, bool make_parents, bool restart,
                          aq_error *err) {
    memset(dir, 0, sizeof *dir);
    memset(journal, 0, sizeof *journal);
    dir->lock_fd = journal->fd = -1;
    size_t n = strlen(target);
    while (n > 1 && target[n - 1] == '/') n--;
    dir->target = aq_alloc(n + 1);
    if (!dir->target) return aq_fail_memory(err, n, "a path");
    memcpy(dir->target, target, n);
    dir->target[n] = 0;
    dir->parent = aq_path_dirname(dir->target);
    if (!dir->parent) return aq_fail_memory(err, n, "a path");
    if (n == 0 || strcmp(dir->target, "/") == 0 || strcmp(dir->target, ".") == 0 || strcmp(dir->target, "..") == 0)
        return aq_fail(err, AQ_ERR_USAGE, "\"%s\" is no name for an output folder", dir->target);

    aq_status status = AQ_OK;
    /* First the leftovers: a run killed right after its rename is tidied up even when the target stops us then. */
    if (aq_path_is_dir(dir->parent)) status = look_for_leftovers(dir, journal, fingerprint, restart, err);
    if (status == AQ_OK) status = check_target(dir, overwrite, make_parents, err);
    if (status != AQ_OK) return status;
    return dir->path ? adopt(dir, journal, err) : create_work(dir, journal, fingerprint, err);
}

aq_status aq_workdir_commit(aq_workdir *dir, bool overwrite, aq_error *err) {
    aq_status status = aq_fsync_path(dir->out, err);
    if (status != AQ_OK) return status;
    bool exists = aq_path_exists(dir->target);
    if (exists && !overwrite) {
        aq_fail_at(err, AQ_ERR_IO, dir->target, NULL, "exists already: it was created while this run worked");
        if (err) err->os_errno = EEXIST;
        aq_hint(err, "repeat the command with --overwrite to replace it; the work is kept");
        return AQ_ERR_IO;
    }
    if (!exists) {
        if (renameat2(AT_FDCWD, dir->out, AT_FDCWD, dir->target, RENAME_NOREPLACE) != 0 &&
            (errno == EEXIST || errno == ENOTEMPTY || rename(dir->out, dir->target) != 0))
            return aq_fail_io(err, errno, dir->target, "cannot rename the result into place");
    } else if (renameat2(AT_FDCWD, dir->out, AT_FDCWD, dir->target, RENAME_EXCHANGE) != 0) {
        /* No atomic exchange here: the old one steps aside for a moment, both stay complete. */
        char *aside = aq_path_join(dir->path, "replaced");
        if (!aside) return aq_fail_memory(err, 1, "a path");
        bool ok = rename(dir->target, aside) == 0;
        if (ok && rename(dir->out, dir->target) != 0) {
            int e = errno;
            rename(aside, dir->target);
            errno = e;
            ok = false;
        }
        aq_free(aside);
        if (!ok) return aq_fail_io(err, errno, dir->target, "cannot rename the result into place");
    }
    return aq_fsync_path(dir->parent, err);
}

void aq_workdir_close(aq_workdir *dir, bool keep) {
    if (dir->path && dir->lock_fd >= 0 && !keep) aq_remove_tree(dir->path, NULL);
    if (dir->lock_fd >= 0) close(dir->lock_fd);
    aq_free(dir->target);
    aq_free(dir->parent);
    aq_free(dir->path);
    aq_free(dir->out);
    memset(dir, 0, sizeof *dir);
    dir->lock_fd = -1;
}

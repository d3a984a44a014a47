/* Writing a container (docs/format.md, "How it is written"): each record is a row group, row groups go to files, checkpoints make them durable.
 *
 * Every decision that shapes the bytes (where a row group, a checkpoint or a file ends) depends on the records and options alone, so that a run that
 * was killed and continued writes the same bytes as one that was not. */
#include <arrowquant/store.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/size.h"
#include "store/extension.h"
#include "store/row.h"
#include "store/store_internal.h"
#include "store/workdir.h"

#define ROW_GROUP_OVERHEAD 3500 /* page headers and footer entry of one row group, about */
#define CHECKPOINT_BYTES (UINT64_C(64) << 20)
#define RECORD_LIMIT (UINT64_C(255) << 20) /* a value and its page stay below AQ_LIMIT_PAGE_BYTES */
#define DEFAULT_SHARD_BYTES UINT64_C(5000000000)

struct aq_store_writer {
    aq_workdir dir;
    aq_journal journal;
    aq_row row;
    carquet_schema_t *schema;
    carquet_writer_t *parquet; /* open file, or NULL */
    char *config_json;
    aq_modality modality;
    bool is_diffusion_model, overwrite, no_verify;
    bool (*keep_going)(void *user);
    void *keep_going_user;
    uint64_t shard_bytes, predicted_bytes;
    uint32_t file_index; /* of the open or last file, from 1 */
    uint64_t file_bytes; /* payload in it */
    uint64_t since_checkpoint;
    uint64_t row_groups; /* in the open file */
    bool broken;         /* a write failed: only abort makes sense */
};

static void step(const char *what) {
    if (aq_store_step) aq_store_step(what);
}

/* "DIR/out/part-00001.parquet", or the final name when n_files is given. */
static char *file_path(const aq_store_writer *w, uint32_t index, uint32_t n_files) {
    char name[64];
    if (n_files)
        snprintf(name, sizeof name, "model-%05u-of-%05u.parquet", index, n_files);
    else
        snprintf(name, sizeof name, "part-%05u.parquet", index);
    return aq_path_join(w->dir.out, name);
}

static void parquet_options(carquet_writer_options_t *o) {
    carquet_writer_options_init(o);
    o->row_group_size = INT64_MAX; /* row groups end where we say */
    o->page_size = INT32_MAX;      /* one page a column chunk */
    o->write_statistics = false;   /* they would repeat every value, twice */
    o->write_crc = true;
    o->async_io = false;
    o->created_by = "ArrowQuant " AQ_VERSION;
}

static aq_status open_file(aq_store_writer *w, const char *path, aq_error *err) {
    carquet_writer_options_t options;
    carquet_error_t error = CARQUET_ERROR_INIT;
    parquet_options(&options);
    errno = 0;
    w->parquet = carquet_writer_create(path, w->schema, &options, &error);
    if (!w->parquet) return aq_store_carquet_fail(err, path, error.code, "cannot create");
    const char *pairs[][2] = {
        {"arrowquant.schema_version", AQ_SCHEMA_VERSION},
        {"arrowquant.version", AQ_VERSION},
        {"arrowquant.config", w->config_json},
        {"arrowquant.modality", aq_modality_name(w->modality)},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        carquet_status_t status = carquet_writer_add_metadata(w->parquet, pairs[i][0], pairs[i][1]);
        if (status != CARQUET_OK) return aq_store_carquet_fail(err, path, status, "cannot write");
    }
    return AQ_OK;
}

static aq_status reopen_file(aq_store_writer *w, const char *path, aq_error *err) {
    carquet_writer_options_t options;
    carquet_error_t error = CARQUET_ERROR_INIT;
    parquet_options(&options);
    errno = 0;
    w->parquet = carquet_writer_open_append(path, w->schema, &options, &error);
    if (!w->parquet) return aq_store_carquet_fail(err, path, error.code, "cannot continue");
    return AQ_OK;
}

/* Reads back the footer of a file that was just closed: proof that all of it arrived, and what the journal keeps. */
static aq_status read_footer(const char *path, uint64_t *data_end, uint8_t **footer, uint64_t *footer_size, aq_error *err) {
    struct stat st;
    uint8_t tail[8] = {0};
    *footer = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return aq_fail_io(err, errno, path, "cannot open");
    aq_status status = fsync(fd) != 0 ? aq_fail_io(err, errno, path, "cannot sync") : AQ_OK;
    if (status == AQ_OK && fstat(fd, &st) != 0) status = aq_fail_io(err, errno, path, "cannot read its size");
    uint64_t size = status == AQ_OK ? (uint64_t)st.st_size : 0;
    if (status == AQ_OK && size < 12) status = aq_fail_io(err, ENOSPC, path, "was not written whole");
    if (status == AQ_OK) status = aq_file_pread(fd, tail, 8, size - 8, path, err);
    uint64_t n = (uint64_t)tail[0] | (uint64_t)tail[1] << 8 | (uint64_t)tail[2] << 16 | (uint64_t)tail[3] << 24;
    if (status == AQ_OK && (memcmp(tail + 4, "PAR1", 4) != 0 || n > size - 12)) status = aq_fail_io(err, ENOSPC, path, "was not written whole");
    if (status == AQ_OK && !(*footer = aq_alloc(n))) status = aq_fail_memory(err, n, "a footer");
    if (status == AQ_OK) status = aq_file_pread(fd, *footer, n, size - 8 - n, path, err);
    close(fd);
    if (status != AQ_OK) {
        aq_free(*footer);
        *footer = NULL;
        return status;
    }
    *data_end = size - 8 - n;
    *footer_size = n;
    return AQ_OK;
}

/* Makes all row groups so far durable. The file stays open for more unless it is complete. */
static aq_status checkpoint(aq_store_writer *w, bool complete, aq_error *err) {
    char *path = file_path(w, w->file_index, 0);
    if (!path) return aq_fail_memory(err, 1, "a path");
    uint8_t *footer = NULL;
    uint64_t data_end = 0, footer_size = 0;
    errno = 0;
    carquet_status_t closed = carquet_writer_close(w->parquet);
    w->parquet = NULL;
    step("file closed");
    aq_status status =
        closed == CARQUET_OK ? read_footer(path, &data_end, &footer, &footer_size, err) : aq_store_carquet_fail(err, path, closed, "cannot write");
    if (status == AQ_OK) status = aq_fsync_path(w->dir.out, err);
    if (status == AQ_OK) status = aq_journal_checkpoint(&w->journal, w->file_index, complete, data_end, w->file_bytes, w->row_groups, footer, footer_size, err);
    if (status == AQ_OK) {
        w->since_checkpoint = 0;
        if (!complete) status = reopen_file(w, path, err);
        step("checkpoint");
    }
    aq_free(path);
    return status;
}

/* Bytes between checkpoints: losing them costs little, and a checkpoint (two syncs, the footer twice) stays cheap beside them. */
static uint64_t checkpoint_distance(const aq_store_writer *w) {
    uint64_t spacing = w->predicted_bytes / 16, by_footer = 16 * ROW_GROUP_OVERHEAD * w->row_groups / 2;
    if (spacing < by_footer) spacing = by_footer;
    return spacing < CHECKPOINT_BYTES ? spacing : CHECKPOINT_BYTES;
}

/* Writes one record as a row group, opening, checkpointing and closing files as its place asks for. */
static aq_status write_group(aq_store_writer *w, const aq_store_record *r, aq_error *err) {
    if (!w->parquet) {
        w->file_index++;
        w->file_bytes = w->row_groups = 0;
    }
    char *path = file_path(w, w->file_index, 0);
    aq_status status = path ? AQ_OK : aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK && !w->parquet) status = open_file(w, path, err);
    if (status == AQ_OK) status = aq_row_fill(&w->row, r, w->is_diffusion_model, w->modality, err);
    if (status == AQ_OK) status = aq_row_write(&w->row, w->parquet, path, err);
    step("row group");
    aq_free(path);
    if (status != AQ_OK) return status;
    uint64_t bytes = r->data_bytes + (r->quantized ? r->params_bytes : 0) + 8 * r->n_equalization_scales + ROW_GROUP_OVERHEAD;
    w->row_groups++;
    w->file_bytes += bytes;
    w->since_checkpoint += bytes;
    if (w->file_bytes >= w->shard_bytes) return checkpoint(w, true, err);
    return w->since_checkpoint >= checkpoint_distance(w) ? checkpoint(w, false, err) : AQ_OK;
}

/* ---- continuing an interrupted run ---- */

/* Brings the files back to the last checkpoint. */
static aq_status restore(aq_store_writer *w, aq_error *err) {
    aq_journal *j = &w->journal;
    aq_names names = {0};
    aq_status status = aq_list_dir(&names, w->dir.out, 1000000, err);
    for (size_t i = 0; status == AQ_OK && i < names.n_names; i++) {
        unsigned index = 0, n = 0;
        int end = 0;
        const char *name = names.names[i];
        char *path = aq_path_join(w->dir.out, name), *temporary = NULL;
        if (!path) status = aq_fail_memory(err, 1, "a path");
        /* Files that got their final name before the run was killed get their working name back. */
        if (path && status == AQ_OK && sscanf(name, "model-%5u-of-%5u.parquet%n", &index, &n, &end) == 2 && end && !name[end]) {
            temporary = file_path(w, index, 0);
            if (!temporary)
                status = aq_fail_memory(err, 1, "a path");
            else if (rename(path, temporary) != 0)
                status = aq_fail_io(err, errno, path, "cannot rename");
        } else if (path && status == AQ_OK && sscanf(name, "part-%5u.parquet%n", &index, &end) == 1 && end && !name[end] && index > j->file_index) {
            if (unlink(path) != 0) status = aq_fail_io(err, errno, path, "cannot remove"); /* written after the last checkpoint */
        }
        aq_free(temporary);
        aq_free(path);
    }
    aq_names_free(&names);
    if (status != AQ_OK || j->file_index == 0) return status;

    char *path = file_path(w, j->file_index, 0);
    struct stat st;
    if (!path) return aq_fail_memory(err, 1, "a path");
    for (uint32_t i = 1; status == AQ_OK && i <= j->file_index; i++) {
        char *each = file_path(w, i, 0);
        if (!each || stat(each, &st) != 0 || (i == j->file_index && (uint64_t)st.st_size < j->data_end)) {
            status = aq_fail_at(err, AQ_ERR_USAGE, each, NULL, "is missing or shorter than the state of the interrupted run says");
            aq_hint(err, "--restart discards that state and starts over");
        }
        aq_free(each);
    }
    int fd = status == AQ_OK ? open(path, O_WRONLY | O_CLOEXEC) : -1;
    if (status == AQ_OK && fd < 0) status = aq_fail_io(err, errno, path, "cannot open");
    if (fd >= 0) {
        uint64_t n = j->footer_size;
        uint8_t tail[8] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24), 'P', 'A', 'R', '1'};
        if (ftruncate(fd, (off_t)j->data_end) != 0 || lseek(fd, (off_t)j->data_end, SEEK_SET) < 0) status = aq_fail_io(err, errno, path, "cannot continue");
        if (status == AQ_OK) status = aq_fd_write(fd, j->footer, n, path, err);
        if (status == AQ_OK) status = aq_fd_write(fd, tail, 8, path, err);
        if (status == AQ_OK && fsync(fd) != 0) status = aq_fail_io(err, errno, path, "cannot sync");
        close(fd);
    }
    w->file_index = j->file_index;
    w->file_bytes = j->file_bytes;
    w->row_groups = j->row_groups;
    if (status == AQ_OK && !j->file_closed) status = reopen_file(w, path, err);
    aq_free(path);
    return status;
}

/* ---- public ---- */

static aq_status check_space(const aq_store_writer *w, aq_error *err) {
    struct statvfs fs;
    if (w->predicted_bytes == 0 || statvfs(w->dir.path, &fs) != 0) return AQ_OK;
    uint64_t free_bytes = UINT64_MAX, need = w->predicted_bytes + w->predicted_bytes / 8; /* the journal's share included */
    aq_mul((uint64_t)fs.f_bavail, (uint64_t)fs.f_frsize, &free_bytes);
    uint64_t have = free_bytes + w->journal.data_end;
    if (have >= need || have < free_bytes) return AQ_OK;
    aq_fail_at(err, AQ_ERR_IO, w->dir.target, NULL, "about %llu MB are needed and %llu MB are free", (unsigned long long)(need >> 20),
               (unsigned long long)(have >> 20));
    aq_hint(err, "free some space, or choose an output on another disk");
    return AQ_ERR_IO;
}

aq_status aq_store_writer_create(aq_store_writer **out, const char *out_path, const aq_store_writer_options *o, aq_error *err) {
    *out = NULL;
    aq_error_clear(err);
    aq_store_writer *w = aq_calloc(1, sizeof *w);
    if (!w) return aq_fail_memory(err, sizeof *w, "the writer");
    w->dir.lock_fd = w->journal.fd = -1;
    w->modality = o->modality;
    w->is_diffusion_model = o->is_diffusion_model;
    w->overwrite = o->overwrite;
    w->no_verify = o->no_verify;
    w->keep_going = o->keep_going;
    w->keep_going_user = o->keep_going_user;
    w->shard_bytes = o->shard_bytes ? o->shard_bytes : DEFAULT_SHARD_BYTES;
    w->predicted_bytes = o->predicted_bytes;
    w->config_json = aq_strdup(o->config_json ? o->config_json : "{}");
    w->schema = aq_store_schema_create();
    aq_status status = w->config_json && w->schema ? AQ_OK : aq_fail_memory(err, 1, "the writer");
    if (status == AQ_OK) {
        aq_row_init(&w->row, w->schema);
        status = aq_workdir_open(&w->dir, &w->journal, out_path, o->fingerprint ? o->fingerprint : "", o->overwrite, o->make_parents, o->restart, err);
    }
    if (status == AQ_OK) status = check_space(w, err);
    if (status == AQ_OK && w->dir.resumed) {
        status = restore(w, err);
        if (status == AQ_OK)
            aq_logf(o->log, o->log_user, AQ_LOG_INFO, "continuing an interrupted run: %llu tensors or parts of tensors are already done",
                    (unsigned long long)w->journal.n_durable);
    }
    if (status != AQ_OK) {
        aq_store_writer_abort(w, true);
        return status;
    }
    *out = w;
    return AQ_OK;
}

uint64_t aq_store_writer_n_done(const aq_store_writer *w) { return w->dir.resumed ? w->journal.n_durable : 0; }

bool aq_store_writer_done(const aq_store_writer *w, uint64_t index, aq_store_record *out) {
    if (index >= aq_store_writer_n_done(w)) return false;
    const aq_done_record *d = &w->journal.done[index];
    *out = (aq_store_record){.name = d->name,
                             .quant_type = d->quant_type,
                             .quantized = d->quantized,
                             .spec = d->spec,
                             .row_begin = d->row_begin,
                             .row_count = d->row_count,
                             .quality = d->quality};
    return true;
}

static aq_status check_record(const aq_store_record *r, aq_error *err) {
    if (r->data_bytes > RECORD_LIMIT || r->params_bytes > RECORD_LIMIT || r->n_equalization_scales > RECORD_LIMIT / 4)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, r->name, "a part of %llu bytes is over the limit of %llu", (unsigned long long)r->data_bytes,
                          (unsigned long long)RECORD_LIMIT);
    const char *fault = aq_extension_fault(r);
    if (fault) return aq_fail_at(err, AQ_ERR_USAGE, NULL, r->name, "%s", fault);
    if (!r->quantized) return AQ_OK;
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_shape_matrix(&r->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&layout, &r->spec, r->row_count, cols, err);
    if (status != AQ_OK) return status;
    if (r->row_begin > rows || r->row_count > rows - r->row_begin || layout.codes_bytes != r->data_bytes || layout.params_bytes != r->params_bytes)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, r->name, "%llu code bytes and %llu parameter bytes do not fit its shape, expected %llu and %llu",
                          (unsigned long long)r->data_bytes, (unsigned long long)r->params_bytes, (unsigned long long)layout.codes_bytes,
                          (unsigned long long)layout.params_bytes);
    uint64_t unit = r->spec.group_size ? r->spec.group_size : rows;
    if (r->spec.axis == 0 && r->row_count != rows && (r->row_begin % unit != 0 || (r->row_count % unit != 0 && r->row_begin + r->row_count != rows)))
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, r->name, "parts of groups of rows must begin at a group");
    if ((r->spec.group_size ? r->spec.group_size : r->spec.axis == 1 ? cols : rows) > INT32_MAX)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, r->name, "a group of more than 2^31 - 1 elements cannot be stored");
    return AQ_OK;
}

aq_status aq_store_writer_add(aq_store_writer *w, const aq_store_record *r, aq_error *err) {
    aq_error_clear(err);
    if (w->broken) return aq_fail(err, AQ_ERR_USAGE, "the writer failed before and takes no more tensors");
    aq_status status = check_record(r, err);
    if (status != AQ_OK) return status;
    status = aq_journal_remember(&w->journal, r, err);
    if (status == AQ_OK) status = write_group(w, r, err);
    w->broken = status != AQ_OK;
    return status;
}

/* A path inside the output: plain components only, and not one of the container's own files. */
static bool is_plain_relative(const char *path) {
    size_t n = strlen(path);
    if (n == 0 || path[0] == '/' || path[n - 1] == '/' || strchr(path, '\\')) return false;
    for (const char *p = path; *p;) {
        size_t len = strcspn(p, "/");
        if (len == 0 || (len == 1 && p[0] == '.') || (len == 2 && p[0] == '.' && p[1] == '.')) return false;
        p += len + (p[len] == '/');
    }
    return strchr(path, '/') || (strcmp(path, "metadata.json") != 0 && !aq_text_ends_with(path, ".parquet"));
}

aq_status aq_store_writer_copy(aq_store_writer *w, const char *relative_path, const char *source_path, aq_error *err) {
    aq_error_clear(err);
    if (!is_plain_relative(relative_path)) return aq_fail_at(err, AQ_ERR_USAGE, relative_path, NULL, "cannot be a side file of a container");
    char *path = aq_path_join(w->dir.out, relative_path), *dir = path ? aq_path_dirname(path) : NULL;
    aq_status status = dir ? aq_make_dirs(dir, err) : aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK) status = aq_file_copy_while(source_path, path, w->keep_going, w->keep_going_user, err);
    aq_free(path);
    aq_free(dir);
    return status;
}

/* Hashing of all files, on a thread of its own: it takes as long as reading them back does. */
typedef struct {
    const aq_store_writer *writer;
    json_t *files;
    atomic_bool stop;
    aq_status status;
    aq_error err;
} hashing;

static bool not_stopped(void *user) {
    const hashing *h = user;
    return !atomic_load(&h->stop);
}

/* Adds size and SHA-256 of each file below DIR to `files`. Iterates: `prefix` is "" or "sub/", `depth` bounds the nesting of what we copied. */
static aq_status list_files(hashing *h, const char *prefix, int depth, aq_error *err) {
    const char *root = h->writer->dir.out;
    char *dir = aq_path_join(root, prefix[0] ? prefix : "."), *path = NULL;
    aq_names names = {0};
    aq_status status = dir ? aq_list_dir(&names, dir, 1000000, err) : aq_fail_memory(err, 1, "a path");
    for (size_t i = 0; status == AQ_OK && i < names.n_names; i++) {
        size_t n = strlen(prefix) + strlen(names.names[i]) + 2;
        char *relative = aq_alloc(n), sha[65];
        path = NULL;
        if (relative) {
            snprintf(relative, n, "%s%s", prefix, names.names[i]);
            path = aq_path_join(root, relative);
        }
        if (!path) {
            status = aq_fail_memory(err, n, "a path");
        } else if (aq_path_is_dir(path)) {
            memcpy(relative + n - 2, "/", 2);
            status = depth < 16 ? list_files(h, relative, depth + 1, err) : aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "is nested too deep");
        } else if (strcmp(relative, "metadata.json") != 0) {
            struct stat st;
            status = aq_file_sha256_while(path, sha, not_stopped, h, err);
            if (status == AQ_OK && stat(path, &st) != 0) status = aq_fail_io(err, errno, path, "cannot read its size");
            if (status == AQ_OK && json_object_set_new(h->files, relative, json_pack("{s:I, s:s}", "bytes", (json_int_t)st.st_size, "sha256", sha)) != 0)
                status = aq_fail_memory(err, n, "metadata.json");
        }
        aq_free(relative);
        aq_free(path);
    }
    aq_names_free(&names);
    aq_free(dir);
    return status;
}

static void *hash_files(void *arg) {
    hashing *h = arg;
    aq_error_clear(&h->err);
    h->status = list_files(h, "", 0, &h->err);
    return NULL;
}

/* Completes the caller's metadata with the files and writes it. Canonical: sorted keys, fixed number format. */
static aq_status write_metadata(aq_store_writer *w, json_t *root, json_t *files, char sha256[65], aq_error *err) {
    char *path = aq_path_join(w->dir.out, "metadata.json"), *draft = aq_path_join(w->dir.path, "metadata.json"), *text = NULL;
    aq_status status = path && draft ? AQ_OK : aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK && (json_object_set(root, "files", files) != 0 || json_object_set_new(root, "format", json_string("arrowquant")) != 0 ||
                            json_object_set_new(root, "schema_version", json_string(AQ_SCHEMA_VERSION)) != 0 ||
                            json_object_set_new(root, "arrowquant_version", json_string(AQ_VERSION)) != 0 ||
                            (!json_object_get(root, "modality") && w->modality != AQ_MODALITY_UNKNOWN &&
                             json_object_set_new(root, "modality", json_string(aq_modality_name(w->modality))) != 0)))
        status = aq_fail_memory(err, 1, "metadata.json");
    if (status == AQ_OK && !(text = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17))))
        status = aq_fail_memory(err, 1, "metadata.json");
    if (status == AQ_OK) {
        aq_json_shorten(text);
        size_t n = strlen(text);
        text[n] = '\n'; /* in place of the terminator */
        aq_sha256_hex(text, n + 1, sha256);
        /* Written in the work folder: what a kill leaves of it there is no part of the output. */
        status = aq_file_write(draft, text, n + 1, err);
        if (status == AQ_OK && rename(draft, path) != 0) status = aq_fail_io(err, errno, path, "cannot rename into place");
    }
    free(text);
    aq_free(draft);
    aq_free(path);
    return status;
}

typedef struct {
    char first[1024];
    size_t n;
} problems;

static void note_problem(void *user, const char *problem) {
    problems *p = user;
    if (p->n++ == 0) snprintf(p->first, sizeof p->first, "%s", problem);
}

static aq_status verify_output(aq_store_writer *w, aq_error *err) {
    aq_store *store;
    problems found = {{0}, 0};
    aq_status status = aq_store_open(&store, w->dir.out, err);
    if (status == AQ_OK) {
        status = aq_store_verify_while(store, note_problem, &found, w->keep_going, w->keep_going_user, err);
        aq_store_close(store);
    }
    if (status == AQ_OK || status == AQ_ERR_INTERRUPTED || status == AQ_ERR_MEMORY) return status;
    char why[1024];
    snprintf(why, sizeof why, "%s", found.n ? found.first : err ? err->message : "");
    aq_fail_at(err, AQ_ERR_IO, w->dir.target, NULL, "what was written could not be read back: %s", why);
    aq_hint(err, "the disk or memory may be failing; nothing was put in place");
    return AQ_ERR_IO;
}

/* Completes the files and gives them their final names. */
static aq_status close_files(aq_store_writer *w, aq_error *err) {
    aq_status status = AQ_OK;
    if (w->file_index == 0) { /* a model without tensors is one empty file */
        w->file_index = 1;
        char *path = file_path(w, 1, 0);
        status = path ? open_file(w, path, err) : aq_fail_memory(err, 1, "a path");
        aq_free(path);
    }
    if (status == AQ_OK && w->parquet) status = checkpoint(w, true, err);
    for (uint32_t i = 1; status == AQ_OK && i <= w->file_index; i++) {
        char *from = file_path(w, i, 0), *to = file_path(w, i, w->file_index);
        if (!from || !to)
            status = aq_fail_memory(err, 1, "a path");
        else if (rename(from, to) != 0)
            status = aq_fail_io(err, errno, from, "cannot rename");
        step("file named");
        aq_free(from);
        aq_free(to);
    }
    return status;
}

/* Reads the closed files back and describes them in metadata.json. */
static aq_status verify_and_describe(aq_store_writer *w, const char *metadata_json, char sha256[65], aq_error *err) {
    json_t *root = NULL;
    char *old = aq_path_join(w->dir.out, "metadata.json");
    hashing *h = aq_calloc(1, sizeof *h);
    aq_status status = old && h && (h->files = json_object()) ? AQ_OK : aq_fail_memory(err, 1, "metadata.json");
    if (!metadata_json) metadata_json = "{}";
    if (status == AQ_OK) status = aq_json_parse(&root, metadata_json, strlen(metadata_json), 64, "metadata", err);
    if (status == AQ_OK && !json_is_object(root)) status = aq_fail(err, AQ_ERR_USAGE, "the metadata of a container must be a JSON object");
    if (status == AQ_OK && old && aq_path_exists(old) && unlink(old) != 0) status = aq_fail_io(err, errno, old, "cannot replace"); /* of a run killed here */
    if (status == AQ_OK && h) {
        pthread_t thread;
        h->writer = w;
        bool threaded = pthread_create(&thread, NULL, hash_files, h) == 0;
        if (!threaded) hash_files(h);
        if (!w->no_verify) status = verify_output(w, err);
        if (status != AQ_OK) atomic_store(&h->stop, true);
        if (threaded) pthread_join(thread, NULL);
        if (status == AQ_OK && h->status != AQ_OK) {
            status = h->status;
            if (err) *err = h->err;
        }
    }
    if (status == AQ_OK && h) status = write_metadata(w, root, h->files, sha256, err);
    step("metadata");
    if (h) json_decref(h->files);
    json_decref(root);
    aq_free(h);
    aq_free(old);
    return status;
}

aq_status aq_store_writer_finish(aq_store_writer *w, const char *metadata_json, aq_error *err) {
    char sha256[65];
    aq_error_clear(err);
    aq_status status = w->broken ? aq_fail(err, AQ_ERR_USAGE, "the writer failed before and cannot finish") : close_files(w, err);
    if (status == AQ_OK) status = verify_and_describe(w, metadata_json, sha256, err);
    if (status == AQ_OK) status = aq_journal_final(&w->journal, sha256, err);
    if (status == AQ_OK) status = aq_workdir_commit(&w->dir, w->overwrite, err);
    step("renamed into place");
    aq_store_writer_abort(w, status != AQ_OK);
    return status;
}

bool aq_store_writer_abort(aq_store_writer *w, bool keep_state) {
    if (!w) return false;
    carquet_writer_abort(w->parquet);
    /* Before the first checkpoint there is nothing to continue. */
    bool kept = keep_state && w->journal.n_durable > 0;
    aq_workdir_close(&w->dir, kept);
    aq_journal_close(&w->journal);
    aq_row_free(&w->row);
    carquet_schema_free(w->schema);
    aq_free(w->config_json);
    aq_free(w);
    return kept;
}

/* A container back to safetensors (see pipeline.h): same names and shapes as the source, its folder layout and side files restored.
 *
 * Tensors are converted in slabs by several threads and written in order as they come; what is in flight is bounded. A folder is built beside the target
 * (`OUT.exporting`, locked by its run) and renamed when it is complete; a single file is renamed by its writer.
 */
#include <arrowquant/store.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/ordered.h"
#include "pipeline/job.h"
#include "pipeline/quantize.h"
#include "pipeline/report.h"
#include "pipeline/source.h"

enum { MAX_THREADS = 256 };
#define IN_FLIGHT_BYTES (UINT64_C(64) << 20)

typedef struct {
    aq_source source;
    aq_job job;
    const char *dtype; /* "F32", "F16", "BF16" or NULL */
    const char *out_path;
    bool overwrite, make_parents, single_file;
    int n_threads;
    json_t *metadata; /* of the container */
    aq_st_entry *entries;
    aq_st_writer *writer;
    aq_slabs slabs;
    void *open[AQ_ORDERED_WINDOW]; /* converted slabs */
    float *scratch[MAX_THREADS];
    uint64_t infinite[AQ_ORDERED_WINDOW]; /* finite values that became infinite, per open slab */
    uint64_t n_infinite, bytes_done, n_done, n_converted;
    aq_error errors[AQ_ORDERED_WINDOW];
    aq_sentences warnings, files;
} exporting;

/* Element type of a tensor in the output: what was asked for floating tensors, else the source's; reduced ones come out as BF16. */
static aq_dtype target_dtype(const exporting *x, const aq_source_tensor *t) {
    aq_dtype source = aq_dtype_from_name(t->dtype);
    if (!t->is_float) return source;
    if (x->dtype) return aq_dtype_from_name(x->dtype);
    if (!t->stored->quantized) return t->stored->raw_dtype;
    return source == AQ_F64 || source == AQ_F32 || source == AQ_F16 ? source : AQ_BF16;
}

static bool is_verbatim(const exporting *x, const aq_source_tensor *t) {
    return !t->stored->quantized && (!t->is_float || target_dtype(x, t) == t->stored->raw_dtype);
}

static void shape_of(void *user, size_t i, uint64_t *rows, uint64_t *cols) {
    const exporting *x = user;
    aq_source_tensor t;
    aq_source_tensor_at(&x->source, i, &t);
    bool whole = is_verbatim(x, &t);
    *rows = whole ? 1 : t.rows;
    *cols = whole ? 1 : t.cols;
}

static uint64_t stored_raw_bytes(const aq_source_tensor *t) { return t->count * aq_dtype_size(t->stored->raw_dtype); }

static aq_status list_entries(exporting *x, aq_error *err) {
    size_t n = x->source.n_tensors;
    if (!(x->entries = aq_calloc(n, sizeof *x->entries))) return aq_fail_memory(err, n * sizeof *x->entries, "the tensor list");
    for (size_t i = 0; i < n; i++) {
        aq_source_tensor t;
        aq_source_tensor_at(&x->source, i, &t);
        aq_dtype dtype = target_dtype(x, &t);
        if (dtype == AQ_DTYPE_OTHER) {
            aq_fail_at(err, AQ_ERR_FORMAT, aq_source_path(&x->source), t.name, "has the element type %s, which safetensors files here cannot hold", t.dtype);
            return AQ_ERR_FORMAT;
        }
        bool verbatim = is_verbatim(x, &t);
        x->entries[i] = (aq_st_entry){
            .name = t.name, .dtype = aq_dtype_name(dtype), .shape = t.shape, .size_bytes = verbatim ? stored_raw_bytes(&t) : t.count * aq_dtype_size(dtype)};
        x->n_converted += !verbatim;
        x->job.bytes_total += x->entries[i].size_bytes;
    }
    x->job.n_total = n;
    return aq_slabs_init(&x->slabs, n, shape_of, x, err);
}

/* ---- conversion ---- */

static bool is_infinite(float x) { return (aq_f32_bits(x) & 0x7FFFFFFF) == 0x7F800000; }

/* Converts n values; returns how many finite ones became infinite. */
static uint64_t convert(const float *from, uint64_t n, aq_dtype dtype, void *to) {
    uint64_t lost = 0;
    if (dtype == AQ_F32) {
        memcpy(to, from, (size_t)n * 4);
    } else if (dtype == AQ_F64) {
        for (uint64_t i = 0; i < n; i++) ((double *)to)[i] = (double)from[i];
    } else if (dtype == AQ_BF16) {
        for (uint64_t i = 0; i < n; i++) {
            uint16_t h = ((uint16_t *)to)[i] = aq_f32_to_bf16(from[i]);
            lost += (h & 0x7FFF) == 0x7F80 && !is_infinite(from[i]);
        }
    } else {
        for (uint64_t i = 0; i < n; i++) {
            uint16_t h = ((uint16_t *)to)[i] = aq_f32_to_f16(from[i]);
            lost += (h & 0x7FFF) == 0x7C00 && !is_infinite(from[i]);
        }
    }
    return lost;
}

typedef struct {
    size_t tensor;
    uint64_t row, n_rows;
    aq_source_tensor t;
    aq_dtype dtype;
    bool verbatim;
} slab;

static slab slab_at(const exporting *x, size_t item) {
    slab s = {.tensor = aq_slabs_tensor(&x->slabs, item)};
    aq_source_tensor_at(&x->source, s.tensor, &s.t);
    s.dtype = target_dtype(x, &s.t);
    s.verbatim = is_verbatim(x, &s.t);
    uint64_t rows = aq_slab_rows(s.t.rows, s.t.cols, 1);
    s.row = (item - x->slabs.first[s.tensor]) * rows;
    if (!s.verbatim) s.n_rows = s.t.rows - s.row < rows ? s.t.rows - s.row : rows;
    return s;
}

static uint64_t slab_cost(void *context, size_t item) {
    slab s = slab_at(context, item);
    return s.n_rows * s.t.cols * aq_dtype_size(s.dtype);
}

static bool do_slab(void *context, size_t item, size_t part, size_t thread) {
    (void)part;
    exporting *x = context;
    slab s = slab_at(x, item);
    size_t at = item % AQ_ORDERED_WINDOW;
    aq_error *err = &x->errors[at];
    x->infinite[at] = 0;
    if (s.verbatim) return true; /* copied when it is its turn */
    uint64_t n = s.n_rows * s.t.cols;
    if (!x->scratch[thread]) x->scratch[thread] = aq_alloc(x->slabs.max_values * sizeof(float));
    x->open[at] = aq_alloc(n * aq_dtype_size(s.dtype));
    if (!x->scratch[thread] || !x->open[at]) {
        aq_fail_memory(err, n * sizeof(float), "a slab of weights");
        return false;
    }
    if (aq_source_read_f32(&x->source, s.tensor, s.row, s.n_rows, x->scratch[thread], err) != AQ_OK) return false;
    x->infinite[at] = convert(x->scratch[thread], n, s.dtype, x->open[at]);
    return true;
}

static aq_status write_verbatim(exporting *x, size_t tensor, aq_error *err) {
    for (size_t piece = 0;; piece++) {
        const void *data;
        uint64_t size;
        aq_status status = aq_source_raw(&x->source, tensor, piece, &data, &size, err);
        if (status != AQ_OK || size == 0) return status;
        if ((status = aq_st_writer_write(x->writer, data, size, err)) != AQ_OK) return status;
    }
}

static bool commit_slab(void *context, size_t item) {
    exporting *x = context;
    slab s = slab_at(x, item);
    size_t at = item % AQ_ORDERED_WINDOW;
    uint64_t size = s.n_rows * s.t.cols * aq_dtype_size(s.dtype);
    aq_status status = s.verbatim ? write_verbatim(x, s.tensor, &x->errors[at]) : aq_st_writer_write(x->writer, x->open[at], size, &x->errors[at]);
    aq_free(x->open[at]);
    x->open[at] = NULL;
    if (status != AQ_OK) return false;
    x->bytes_done += s.verbatim ? x->entries[s.tensor].size_bytes : size;
    x->n_infinite += x->infinite[at];
    if (item + 1 < x->slabs.first[s.tensor + 1]) return true;
    aq_source_release(&x->source, s.tensor);
    x->n_done++;
    double fraction = x->job.bytes_total ? (double)x->bytes_done / (double)x->job.bytes_total : 1;
    aq_job_tell(&x->job, "export", s.t.name, NULL, x->n_done, x->bytes_done, 0.98 * fraction);
    return true;
}

static bool tick(void *context) {
    exporting *x = context;
    return aq_job_tell(&x->job, "export", NULL, NULL, x->n_done, x->bytes_done, 0);
}

/* __metadata__ of the source, or what loaders expect to find. */
static char *header_metadata(const exporting *x) {
    json_t *map = json_object_get(json_object_get(x->metadata, "source"), "metadata");
    json_t *own = json_is_object(map) && json_object_size(map) > 0 ? json_incref(map) : json_pack("{s:s}", "format", "pt");
    char *text = own ? json_dumps(own, JSON_COMPACT) : NULL;
    json_decref(own);
    return text;
}

static aq_status write_weights(exporting *x, const char *path, aq_error *err) {
    char *metadata = header_metadata(x);
    if (!metadata) return aq_fail_memory(err, 0, "the header");
    aq_status status = aq_st_writer_create(&x->writer, path, x->entries, x->source.n_tensors, metadata, x->overwrite, err);
    free(metadata);
    if (status != AQ_OK) return status;
    aq_ordered work = {.n_items = (size_t)x->slabs.n_slabs,
                       .n_threads = x->n_threads,
                       .budget = IN_FLIGHT_BYTES,
                       .context = x,
                       .cost = slab_cost,
                       .part = do_slab,
                       .commit = commit_slab,
                       .tick = tick};
    size_t failed;
    aq_ordered_result result = aq_ordered_run(&work, &failed);
    if (result == AQ_ORDERED_FAILED) {
        status = x->errors[failed % AQ_ORDERED_WINDOW].code;
        if (err) *err = x->errors[failed % AQ_ORDERED_WINDOW];
    } else if (result == AQ_ORDERED_CANCELLED || x->job.cancelled) {
        status = aq_job_cancelled(err, "nothing was written");
    }
    if (status == AQ_OK) {
        status = aq_st_writer_finish(x->writer, err);
    } else {
        aq_st_writer_abort(x->writer);
    }
    x->writer = NULL;
    return status;
}

/* ---- folders ---- */

/* A plain relative path: no "..", no root, nothing empty. Text from metadata.json is data from a file. */
static bool is_safe_relative(const char *path) {
    if (!path[0] || path[0] == '/' || strchr(path, '\\')) return false;
    for (const char *p = path; *p;) {
        size_t n = strcspn(p, "/");
        if (n == 0 || (n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.')) return false;
        p += n;
        if (*p == '/' && *++p == 0) return false;
    }
    return true;
}

/* root/relative, its folders made; aq_free. */
static aq_status place(const char *root, const char *relative, char **out, aq_error *err) {
    *out = NULL;
    if (!is_safe_relative(relative)) return aq_fail(err, AQ_ERR_FORMAT, "the stored path \"%s\" is not a plain relative path", relative);
    char *path = aq_path_join(root, relative), *dir = path ? aq_path_dirname(path) : NULL;
    aq_status status = dir ? aq_make_dirs(dir, err) : aq_fail_memory(err, strlen(root) + strlen(relative), "a path");
    aq_free(dir);
    if (status == AQ_OK)
        *out = path;
    else
        aq_free(path);
    return status;
}

/* Path of the weights below the root: the source's own, or a name that loaders know. */
static void weights_path(const exporting *x, char out[512]) {
    json_t *source = json_object_get(x->metadata, "source");
    const char *folder = json_string_value(json_object_get(source, "weights_folder")), *name = json_string_value(json_object_get(source, "weights_name"));
    if (!name || !aq_text_ends_with(name, ".safetensors")) name = "model.safetensors";
    snprintf(out, 512, "%s%s%s", folder ? folder : "", folder && folder[0] ? "/" : "", name);
}

static aq_status fill_folder(exporting *x, const char *root, aq_error *err) {
    char relative[512], *path;
    weights_path(x, relative);
    aq_status status = place(root, relative, &path, err);
    if (status != AQ_OK) return status;
    status = write_weights(x, path, err);
    aq_free(path);
    if (status == AQ_OK) aq_sentences_add(&x->files, "%s", relative);
    for (size_t i = 0; i < aq_store_n_side_files(x->source.store) && status == AQ_OK; i++) {
        const char *absolute, *name = aq_side_file_original_name(aq_store_side_file(x->source.store, i, &absolute));
        if ((status = place(root, name, &path, err)) != AQ_OK) break;
        status = aq_file_copy_while(absolute, path, tick, x, err);
        aq_free(path);
        if (status == AQ_OK) aq_sentences_add(&x->files, "%s", name);
        if (status == AQ_ERR_INTERRUPTED || (status == AQ_OK && !tick(x))) status = aq_job_cancelled(err, "nothing was written");
    }
    return status;
}

/* Puts the finished folder where it belongs; an older one is swapped out and then removed, so that one of the two is there at every moment. */
static aq_status move_into_place(const exporting *x, const char *work, aq_error *err) {
    if (renameat2(AT_FDCWD, work, AT_FDCWD, x->out_path, RENAME_NOREPLACE) == 0) return AQ_OK;
    if (errno == EEXIST && x->overwrite) {
        if (renameat2(AT_FDCWD, work, AT_FDCWD, x->out_path, RENAME_EXCHANGE) != 0) return aq_fail_io(err, errno, x->out_path, "cannot replace the folder");
        return aq_remove_tree(work, err);
    }
    if (errno == EINVAL && !aq_path_exists(x->out_path) && rename(work, x->out_path) == 0) return AQ_OK; /* a file system without the flag */
    return aq_fail_io(err, errno, x->out_path, "cannot move the result into place");
}

static aq_status export_folder(exporting *x, aq_error *err) {
    size_t n = strlen(x->out_path);
    while (n > 1 && x->out_path[n - 1] == '/') n--;
    char *work = aq_alloc(n + 16), *parent = NULL;
    if (!work) return aq_fail_memory(err, n + 16, "a path");
    snprintf(work, n + 16, "%.*s.exporting", (int)n, x->out_path);
    int lock = -1;
    aq_status status = mkdir(work, 0777) == 0 || errno == EEXIST ? AQ_OK : aq_fail_io(err, errno, work, "cannot create the folder");
    if (status == AQ_OK && (lock = open(work, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0)
        status = aq_fail_io(err, errno, work, "cannot open the folder");
    if (status == AQ_OK && flock(lock, LOCK_EX | LOCK_NB) != 0) {
        status = aq_fail_at(err, AQ_ERR_IO, work, NULL, "another export to the same output is running");
        close(lock);
        aq_free(work);
        return status;
    }
    /* What a killed run left is removed; the folder itself stays, for the lock. */
    aq_names left = {0};
    if (status == AQ_OK) status = aq_list_dir(&left, work, UINT64_MAX, err);
    for (size_t i = 0; i < left.n_names && status == AQ_OK; i++) {
        char *path = aq_path_join(work, left.names[i]);
        status = path ? aq_remove_tree(path, err) : aq_fail_memory(err, n, "a path");
        aq_free(path);
    }
    aq_names_free(&left);
    if (status == AQ_OK) status = fill_folder(x, work, err);
    if (status == AQ_OK) status = aq_fsync_path(work, err);
    if (status == AQ_OK) status = move_into_place(x, work, err);
    if (status == AQ_OK && (parent = aq_path_dirname(x->out_path))) status = aq_fsync_path(parent, err);
    if (status != AQ_OK) aq_remove_tree(work, NULL);
    if (lock >= 0) close(lock);
    aq_free(parent);
    aq_free(work);
    return status;
}

/* ---- checks before work ---- */

static aq_status check_request(exporting *x, const char *to, const char *dtype, aq_error *err) {
    if (strcmp(to, "safetensors") != 0) {
        aq_fail(err, AQ_ERR_USAGE, "unknown export format '%s'. Must be 'safetensors'", to);
        return AQ_ERR_USAGE;
    }
    static const char *const words[][2] = {{"f32", "F32"}, {"f16", "F16"}, {"bf16", "BF16"}};
    for (size_t i = 0; dtype && i < 3; i++)
        if (strcmp(dtype, words[i][0]) == 0) x->dtype = words[i][1];
    if (dtype && !x->dtype) return aq_fail(err, AQ_ERR_USAGE, "unknown element type '%s'. Must be 'f32', 'f16', or 'bf16'", dtype);
    if (!x->out_path || !x->out_path[0]) return aq_fail(err, AQ_ERR_USAGE, "the output path is empty");
    return AQ_OK;
}

/* Only a model folder like the one that is written is ever replaced: a wrong path must not cost a home folder. */
static bool may_replace(const exporting *x) {
    char relative[512];
    weights_path(x, relative);
    char *weights = aq_path_join(x->out_path, relative);
    bool same_kind = weights && aq_path_is_file(weights);
    aq_free(weights);
    aq_names names = {0};
    bool empty = !same_kind && aq_list_dir(&names, x->out_path, 1000000, NULL) == AQ_OK && names.n_names == 0;
    aq_names_free(&names);
    return same_kind || empty;
}

static aq_status check_target(const exporting *x, aq_error *err) {
    if (aq_path_same(x->out_path, aq_source_path(&x->source))) {
        aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is the container itself");
        return AQ_ERR_USAGE;
    }
    for (size_t i = 0; i < aq_store_n_files(x->source.store); i++)
        if (aq_path_same(x->out_path, aq_store_file(x->source.store, i)))
            return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is a file of the container");
    if (aq_path_is_inside(x->out_path, aq_source_path(&x->source)))
        return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output lies inside the container");
    if (aq_path_is_dir(x->out_path) && aq_path_is_inside(aq_source_path(&x->source), x->out_path))
        return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is a folder that holds the container");
    if (aq_path_exists(x->out_path)) {
        if (!x->overwrite) {
            aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL, "exists already");
            if (err) err->os_errno = EEXIST;
            aq_hint(err, "--overwrite replaces it when the new one is complete");
            return AQ_ERR_IO;
        }
        if (x->single_file == aq_path_is_dir(x->out_path))
            return aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL,
                              x->single_file ? "is a folder, and a file would replace it" : "is a file, and a folder would replace it");
        if (!x->single_file && !may_replace(x)) {
            aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL, "is not an exported model like this one and is not replaced");
            aq_hint(err, "choose another output, or remove it yourself");
            return AQ_ERR_IO;
        }
    }
    char *parent = aq_path_dirname(x->out_path);
    if (!parent) return aq_fail_memory(err, strlen(x->out_path), "a path");
    aq_status status = AQ_OK;
    if (!aq_path_is_dir(parent)) {
        status = x->make_parents ? aq_make_dirs(parent, err) : aq_fail_at(err, AQ_ERR_IO, parent, NULL, "the folder for the output does not exist");
        if (!x->make_parents) aq_hint(err, "--mkdir creates it");
    }
    aq_free(parent);
    return status;
}

static aq_status give_report(exporting *x, char **report_json, aq_error *err) {
    if (x->n_infinite > 0)
        aq_sentences_add(&x->warnings, "%llu values are too large for %s and became infinite", (unsigned long long)x->n_infinite,
                         x->dtype ? x->dtype : "their type");
    for (size_t i = 0; i < x->warnings.n_items; i++) aq_job_log(&x->job, AQ_LOG_WARNING, "%s", x->warnings.items[i]);
    json_t *report = json_pack("{s:s, s:o, s:s, s:o, s:{s:o, s:I, s:o}, s:I, s:I, s:o, s:{s:o}}", "schema", "arrowquant.export/1", "path",
                               aq_report_text(aq_source_path(&x->source)), "to", "safetensors", "dtype", aq_report_text(x->dtype), "output", "path",
                               aq_report_text(x->out_path), "size_bytes", (json_int_t)x->job.bytes_total, "files", aq_sentences_json(&x->files), "n_tensors",
                               (json_int_t)x->source.n_tensors, "n_dequantized", (json_int_t)x->n_converted, "warnings", aq_sentences_json(&x->warnings),
                               "time", "elapsed_s", aq_report_real(aq_now_s() - x->job.start_s));
    return aq_report_finish(report, report_json, err);
}

aq_status aq_export(const char *path, const char *to, const char *dtype, const char *out_path, bool overwrite, bool make_parents, const aq_job_hooks *hooks,
                    int n_threads, char **report_json, aq_error *err) {
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    exporting *x = aq_calloc(1, sizeof *x);
    if (!x) return aq_fail_memory(err, sizeof *x, "the export");
    x->out_path = out_path;
    x->overwrite = overwrite;
    x->make_parents = make_parents;
    x->n_threads = n_threads;
    x->single_file = out_path && aq_text_ends_with(out_path, ".safetensors");
    aq_job_init(&x->job, hooks, 0, 0);
    aq_status status = check_request(x, to, dtype, err);
    if (status == AQ_OK) status = aq_source_open(&x->source, path, NULL, err);
    if (status == AQ_OK && !x->source.store) status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a source model, not a container that ArrowQuant wrote");
    if (status == AQ_OK) x->metadata = aq_report_parsed(aq_store_metadata_json(x->source.store));
    if (status == AQ_OK) status = check_target(x, err);
    if (status == AQ_OK) status = list_entries(x, err);
    if (status == AQ_OK) status = x->single_file ? write_weights(x, out_path, err) : export_folder(x, err);
    if (status == AQ_OK) {
        if (x->single_file) aq_sentences_add(&x->files, "%s", out_path);
        status = give_report(x, report_json, err);
    }
    if (status == AQ_OK) aq_job_tell(&x->job, "done", NULL, NULL, x->n_done, x->bytes_done, 1);
    for (size_t i = 0; i < AQ_ORDERED_WINDOW; i++) aq_free(x->open[i]);
    for (size_t i = 0; i < MAX_THREADS; i++) aq_free(x->scratch[i]);
    aq_slabs_free(&x->slabs);
    aq_free(x->entries);
    aq_sentences_free(&x->warnings);
    aq_sentences_free(&x->files);
    json_decref(x->metadata);
    aq_source_close(&x->source);
    aq_free(x);
    return status;
}

/* Exports to a folder (see export.h): the layout and side files of the source come back. It is built beside the target (`OUT.exporting`, locked by its run) and
 * renamed when it is complete. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "pipeline/export.h"
#include "pipeline/quantize.h"

#define MAX_CONFIG (UINT64_C(16) << 20)

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
void aq_export_weights_path(const exporting *x, char out[512]) {
    json_t *source = json_object_get(x->metadata, "source");
    const char *folder = json_string_value(json_object_get(source, "weights_folder")), *name = json_string_value(json_object_get(source, "weights_name"));
    if (!name || !aq_text_ends_with(name, ".safetensors")) name = "model.safetensors";
    snprintf(out, 512, "%s%s%s", folder ? folder : "", folder && folder[0] ? "/" : "", name);
}

/* config.json beside the weights, with what the target has to say in it; `from` is the source's own, or NULL. */
static aq_status write_config(const exporting *x, const char *from, const char *to, aq_error *err) {
    json_t *config = from ? NULL : json_object();
    aq_status status = from ? aq_json_load(&config, from, MAX_CONFIG, 64, err) : AQ_OK;
    if (status == AQ_OK && !json_is_object(config)) status = aq_fail_at(err, AQ_ERR_FORMAT, from, NULL, "expected a JSON object");
    if (status == AQ_OK) status = x->target->config(x, config, err);
    char *text = status == AQ_OK ? aq_json_dump(config, true) : NULL;
    if (status == AQ_OK) status = text ? aq_file_write(to, text, strlen(text), err) : aq_fail_memory(err, 1, "the configuration");
    free(text);
    json_decref(config);
    return status;
}

/* The report names files by their paths below the root. */
static aq_status list_weights(exporting *x, const char *relative, aq_error *err) {
    for (size_t i = 0; i <= x->n_shards; i++) {
        if (i == x->n_shards && i == 1) break;
        char *name = i < x->n_shards ? aq_export_file_path(x, relative, i) : aq_export_index_path(relative);
        if (!name) return aq_fail_memory(err, strlen(relative), "a path");
        aq_sentences_add(&x->files, "%s", name);
        aq_free(name);
    }
    return AQ_OK;
}

static aq_status fill_folder(exporting *x, const char *root, aq_error *err) {
    char relative[512], config[512], *path;
    aq_export_weights_path(x, relative);
    const char *slash = strrchr(relative, '/');
    snprintf(config, sizeof config, "%.*sconfig.json", slash ? (int)(slash + 1 - relative) : 0, relative);
    bool has_config = false;
    aq_status status = place(root, relative, &path, err);
    if (status != AQ_OK) return status;
    status = aq_export_weights(x, path, err);
    aq_free(path);
    if (status == AQ_OK) status = list_weights(x, relative, err);
    for (size_t i = 0; i < aq_store_n_side_files(x->source.store) && status == AQ_OK; i++) {
        const char *absolute, *name = aq_side_file_original_name(aq_store_side_file(x->source.store, i, &absolute));
        if ((status = place(root, name, &path, err)) != AQ_OK) break;
        bool changed = x->target->config && strcmp(name, config) == 0;
        has_config |= changed;
        status = changed ? write_config(x, absolute, path, err) : aq_file_copy_while(absolute, path, aq_export_tick, x, err);
        aq_free(path);
        if (status == AQ_OK) aq_sentences_add(&x->files, "%s", name);
        if (status == AQ_ERR_INTERRUPTED || (status == AQ_OK && !aq_export_tick(x))) status = aq_job_cancelled(err, "nothing was written");
    }
    if (status != AQ_OK || has_config || !x->target->config || (status = place(root, config, &path, err)) != AQ_OK) return status;
    status = write_config(x, NULL, path, err);
    aq_free(path);
    if (status == AQ_OK) aq_sentences_add(&x->files, "%s", config);
    return status;
}

/* Puts the finished folder where it belongs; an older one is swapped out and then removed, so that one of the two is there at every moment. */
static aq_status move_into_place(const exporting *x, const char *work, aq_error *err) {
    if (renameat2(AT_FDCWD, work, AT_FDCWD, x->out_path, RENAME_NOREPLACE) == 0) return AQ_OK;
    if (errno == EEXIST && x->options->overwrite) {
        if (renameat2(AT_FDCWD, work, AT_FDCWD, x->out_path, RENAME_EXCHANGE) != 0) return aq_fail_io(err, errno, x->out_path, "cannot replace the folder");
        return aq_remove_tree(work, err);
    }
    if (errno == EINVAL && !aq_path_exists(x->out_path) && rename(work, x->out_path) == 0) return AQ_OK; /* a file system without the flag */
    return aq_fail_io(err, errno, x->out_path, "cannot move the result into place");
}

aq_status aq_export_folder(exporting *x, aq_error *err) {
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

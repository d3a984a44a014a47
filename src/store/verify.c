/* Integrity of a container: SHA-256 of its files, the CRC of every page, the hash of every tensor. Each finding is one sentence; the search goes on. */
#include "store/store_internal.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "store/row.h"

typedef struct {
    const aq_store *store;
    void (*report)(void *user, const char *problem);
    void *user;
    bool (*keep_going)(void *user);
    void *keep_going_user;
    size_t n_problems;
} check;

static void problem(check *c, const char *format, ...) AQ_PRINTF(2, 3);
static void problem(check *c, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    c->n_problems++;
    if (c->report) c->report(c->user, text);
}

static bool stopped(const check *c) { return c->keep_going && !c->keep_going(c->keep_going_user); }

/* Sizes and SHA-256 that metadata.json lists. */
static aq_status check_files(check *c, aq_error *err) {
    const aq_store *s = c->store;
    if (!s->folder || !s->metadata_json) return AQ_OK;
    json_t *root = NULL, *value;
    aq_status status = aq_json_parse(&root, s->metadata_json, strlen(s->metadata_json), 64, "metadata.json", err);
    if (status != AQ_OK) return status;
    json_t *files = json_object_get(root, "files");
    const char *key;
    json_object_foreach(files, key, value) {
        char *path = aq_path_join(s->path, key), sha[65], shown[512];
        const char *expected = json_string_value(json_object_get(value, "sha256"));
        aq_error why;
        if (!path) {
            status = aq_fail_memory(err, 1, "a path");
            break;
        }
        aq_escape(shown, sizeof shown, path, strlen(path));
        if (!expected)
            problem(c, "%s: metadata.json lists it without sha256", shown);
        else if (aq_file_sha256_while(path, sha, c->keep_going, c->keep_going_user, &why) != AQ_OK)
            problem(c, "%s", why.message);
        else if (strcmp(sha, expected) != 0)
            problem(c, "%s: its SHA-256 is %s, metadata.json says %.64s", shown, sha, expected);
        aq_free(path);
        if (stopped(c)) {
            status = AQ_ERR_INTERRUPTED;
            break;
        }
    }
    for (size_t i = 0; status == AQ_OK && files && i < s->n_files; i++) {
        char *name = aq_path_basename(s->files[i].path), shown[512];
        if (name && !json_object_get(files, name))
            problem(c, "%s: is not listed in metadata.json", aq_escape(shown, sizeof shown, s->files[i].path, strlen(s->files[i].path)));
        aq_free(name);
    }
    json_decref(root);
    return status;
}

/* Reads every page of every column with its CRC. The values themselves are checked by the tensors' hashes. */
static aq_status check_pages(check *c, const aq_store_input *f, aq_error *err) {
    carquet_reader_options_t options;
    carquet_error_t error = CARQUET_ERROR_INIT;
    carquet_reader_options_init(&options);
    options.num_threads = 1;
    options.verify_checksums = true;
    aq_store_input copy = *f;
    copy.reader = carquet_reader_open_buffer(f->map.data, (size_t)f->map.size, &options, &error);
    if (!copy.reader) return aq_fail_at(err, AQ_ERR_MEMORY, f->path, NULL, "cannot be opened again: %s", error.message);
    aq_status status = AQ_OK;
    int32_t n = carquet_reader_num_row_groups(copy.reader);
    for (int32_t i = 0; status == AQ_OK && i < n; i++) {
        carquet_row_group_metadata_t meta;
        if (carquet_reader_row_group_metadata(copy.reader, i, &meta) != CARQUET_OK) continue;
        for (int k = 0; status == AQ_OK && k < COL_COUNT && meta.num_rows > 0; k++) {
            aq_column_data column;
            aq_error why;
            aq_status read = aq_column_read(&column, &copy, i, (aq_column)k, (uint64_t)meta.num_rows, f->map.size / 4 + 64 * (uint64_t)meta.num_rows, &why);
            if (read == AQ_OK)
                aq_column_free(&column);
            else if (read == AQ_ERR_MEMORY)
                status = aq_fail(err, read, "%s", why.message);
            else
                problem(c, "%s", why.message);
        }
        aq_file_map_release(&f->map, 0, f->map.size);
        if (stopped(c)) status = AQ_ERR_INTERRUPTED;
    }
    carquet_reader_close(copy.reader);
    return status;
}

static aq_status check_hashes(check *c) {
    const aq_store *s = c->store;
    for (size_t i = 0; i < s->n_tensors; i++) {
        const aq_stored *t = &s->tensors[i];
        for (size_t k = 0; k < t->info.n_parts; k++) {
            const aq_part *p = &s->parts[t->first_part + k];
            char hash[33], file[512], name[256];
            if (!p->hash[0]) continue;
            aq_store_record_hash(p->data, p->data_bytes, p->params, p->params_bytes, hash);
            if (strcmp(hash, p->hash) != 0)
                problem(c, "%s: tensor \"%s\": its bytes are damaged: their hash is %s, stored was %s",
                        aq_escape(file, sizeof file, s->files[p->file].path, strlen(s->files[p->file].path)),
                        aq_escape(name, sizeof name, t->info.name, strlen(t->info.name)), hash, p->hash);
        }
        aq_store_release(s, i);
        if (stopped(c)) return AQ_ERR_INTERRUPTED;
    }
    return AQ_OK;
}

aq_status aq_store_verify_while(const aq_store *s, void (*report)(void *user, const char *problem), void *user, bool (*keep_going)(void *user),
                                void *keep_going_user, aq_error *err) {
    check c = {.store = s, .report = report, .user = user, .keep_going = keep_going, .keep_going_user = keep_going_user};
    aq_error_clear(err);
    aq_status status = check_files(&c, err);
    for (size_t i = 0; status == AQ_OK && i < s->n_files; i++)
        if (s->files[i].kind == AQ_FILE_V2_EXTENDED) status = check_pages(&c, &s->files[i], err);
    if (status == AQ_OK) status = check_hashes(&c);
    if (status == AQ_ERR_INTERRUPTED) return aq_fail(err, status, "verification was interrupted");
    if (status == AQ_OK && c.n_problems)
        return aq_fail_at(err, AQ_ERR_QUALITY, s->path, NULL, "verification found %zu problem%s", c.n_problems, c.n_problems == 1 ? "" : "s");
    return status;
}

aq_status aq_store_verify(const aq_store *store, void (*report)(void *user, const char *problem), void *user, aq_error *err) {
    return aq_store_verify_while(store, report, user, NULL, NULL, err);
}

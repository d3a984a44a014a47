/* Sharded models: `NAME.safetensors.index.json` with {"metadata": {"total_size": N}, "weight_map": {tensor: file}}.
 *
 * The index is untrusted: its values are plain file names or refused, and what it says is compared with what the shards hold, both ways.
 * Rows IX01-IX05 of the design.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "base/error.h"
#include "base/mem.h"
#include "model/internal.h"
#include "model/scan.h"

typedef struct index_entry {
    const char *name;
    const char *file;
} index_entry;

typedef struct shard_index {
    char *text; /* owned, holds the strings */
    index_entry *entries;
    size_t n_entries, capacity;
    bool has_map, has_total;
    uint64_t total_size;
    const char **shards; /* sorted, each once */
    size_t n_shards;
} shard_index;

/* CON, NUL, COM1 … with any extension open devices on Windows. */
static bool is_device_name(const char *name) {
    static const char *const plain[] = {"CON", "PRN", "AUX", "NUL"};
    size_t n = strcspn(name, ".");
    while (n > 0 && name[n - 1] == ' ') n--;
    for (size_t i = 0; i < 4; i++)
        if (n == 3 && strncasecmp(name, plain[i], 3) == 0) return true;
    return n == 4 && (strncasecmp(name, "COM", 3) == 0 || strncasecmp(name, "LPT", 3) == 0) && name[3] >= '0' && name[3] <= '9';
}

bool aq_is_plain_file_name(const char *name) {
    size_t n = strlen(name);
    if (n == 0 || n > 255 || name[0] == '~' || strcmp(name, ".") == 0 || strcmp(name, "..") == 0) return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 0x20 || name[i] == 0x7F || strchr("/\\:", name[i])) return false;
    return name[n - 1] != '.' && name[n - 1] != ' ' && !is_device_name(name);
}

static aq_status parse_map(aq_scan *s, shard_index *index, const aq_model_options *options) {
    if (index->has_map) return aq_scan_fail(s, "\"weight_map\" appears twice");
    index->has_map = true;
    bool first = true, more;
    aq_status status = aq_scan_expect(s, '{', "the object of \"weight_map\"");
    while (status == AQ_OK && (status = aq_scan_next(s, '}', &first, &more)) == AQ_OK && more) {
        char *name, *file;
        size_t n_name, n_file;
        status = aq_scan_key(s, &name, &n_name, "a tensor's name");
        if (status == AQ_OK) status = aq_scan_string(s, &file, &n_file, "a file name");
        if (status != AQ_OK) return status;
        if (n_name > options->limits.name_bytes)
            return aq_fail_limit(s->err, s->file, name, "name_bytes", options->limits.name_bytes, "a name of %zu bytes", n_name);
        if (index->n_entries >= options->limits.n_tensors)
            return aq_fail_limit(s->err, s->file, NULL, "n_tensors", options->limits.n_tensors, "more than %zu tensors", index->n_entries);
        char escaped[256];
        aq_escape(escaped, sizeof escaped, file, n_file);
        if (!aq_is_plain_file_name(file)) {
            aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, name, "weight_map gives \"%s\", expected one plain file name without folder", escaped);
            aq_hint(s->err, "the index names files outside its folder or unsafe ones: get the model from a source that you trust");
            return AQ_ERR_FORMAT;
        }
        if (!aq_text_ends_with(file, ".safetensors"))
            return aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, name, "weight_map gives \"%s\", expected a .safetensors file%s", escaped,
                              aq_is_pickle_name(file) ? ": pickle is never read; convert first" : "");
        index_entry *entries = aq_grow(index->entries, &index->capacity, index->n_entries, sizeof *entries);
        if (!entries) return aq_fail_memory(s->err, index->capacity * sizeof *entries, "a shard index");
        index->entries = entries;
        entries[index->n_entries++] = (index_entry){name, file};
    }
    return status;
}

/* total_size may be missing or no whole number: it is only compared, never used. */
static aq_status parse_index_metadata(aq_scan *s, shard_index *index) {
    bool first = true, more;
    if (aq_scan_peek(s) != '{') return aq_scan_skip(s);
    aq_status status = aq_scan_expect(s, '{', "an object");
    while (status == AQ_OK && (status = aq_scan_next(s, '}', &first, &more)) == AQ_OK && more) {
        char *key;
        size_t n;
        status = aq_scan_key(s, &key, &n, "a key");
        if (status != AQ_OK) return status;
        char c = aq_scan_peek(s);
        char *number = s->at;
        if ((status = aq_scan_skip(s)) != AQ_OK) return status;
        if (strcmp(key, "total_size") != 0 || c < '0' || c > '9') continue;
        aq_scan again = *s;
        again.at = number;
        again.end = again.limit = s->at;
        again.err = NULL;
        index->has_total = aq_scan_u64(&again, &index->total_size, "a size") == AQ_OK;
    }
    return status;
}

static int compare_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static aq_status list_shards(shard_index *index, const char *path, const aq_model_options *options, aq_error *err) {
    index->shards = aq_calloc(index->n_entries + 1, sizeof *index->shards);
    if (!index->shards) return aq_fail_memory(err, index->n_entries * sizeof *index->shards, "a list of shards");
    for (size_t i = 0; i < index->n_entries; i++) /* neighbours mostly share a shard, so this sorts little */
        if (i == 0 || strcmp(index->entries[i].file, index->entries[i - 1].file) != 0) index->shards[index->n_shards++] = index->entries[i].file;
    if (index->n_shards > 1) qsort(index->shards, index->n_shards, sizeof *index->shards, compare_text);
    size_t n = 0;
    for (size_t i = 0; i < index->n_shards; i++)
        if (n == 0 || strcmp(index->shards[i], index->shards[n - 1]) != 0) index->shards[n++] = index->shards[i];
    index->n_shards = n;
    return n > options->limits.n_shards ? aq_fail_limit(err, path, NULL, "n_shards", options->limits.n_shards, "%zu shards", n) : AQ_OK;
}

static aq_status parse_index(shard_index *index, const aq_file_map *file, char *hash, const char *path, const aq_model_options *options, aq_error *err) {
    if (!(index->text = aq_alloc(file->size))) return aq_fail_memory(err, file->size, path);
    aq_text_reader reader = {file->fd, 0, path, hash};
    aq_scan_source source = {aq_text_read, &reader};
    aq_scan s = {.start = index->text,
                 .at = index->text,
                 .end = index->text,
                 .limit = index->text + file->size,
                 .source = &source,
                 .max_depth = options->limits.json_depth,
                 .file = path,
                 .err = err};
    bool first = true, more;
    aq_status status = aq_scan_expect(&s, '{', "an object with \"weight_map\"");
    while (status == AQ_OK && (status = aq_scan_next(&s, '}', &first, &more)) == AQ_OK && more) {
        char *key;
        size_t n;
        status = aq_scan_key(&s, &key, &n, "a key");
        if (status != AQ_OK) break;
        status = strcmp(key, "weight_map") == 0 ? parse_map(&s, index, options)
                 : strcmp(key, "metadata") == 0 ? parse_index_metadata(&s, index)
                                                : aq_scan_skip(&s);
    }
    if (status != AQ_OK) return status;
    if (aq_scan_peek(&s) || aq_scan_have(&s, 1) || s.broken != AQ_OK) return aq_scan_fail(&s, "text after the end of the JSON");
    if (index->n_entries == 0)
        return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "%s", index->has_map ? "\"weight_map\" is empty: no tensors" : "\"weight_map\" is missing");
    return list_shards(index, path, options, err);
}

static aq_status open_shards(aq_model *model, const shard_index *index, const char *index_path, const aq_model_options *options, aq_error *err) {
    aq_name_list missing = {0};
    aq_status status = AQ_OK;
    for (size_t pass = 0; pass < 2 && status == AQ_OK; pass++) { /* all missing files first, then open */
        for (size_t i = 0; i < index->n_shards && status == AQ_OK; i++) {
            char *path = aq_path_join(model->weights_dir, index->shards[i]);
            if (!path) return aq_fail_memory(err, strlen(model->weights_dir), "a path");
            if (pass == 1) {
                status = aq_model_add_file(model, path, options, err);
                continue;
            }
            struct stat st; /* a link that leads nowhere is missing too */
            if (stat(path, &st) != 0 && errno == ENOENT) aq_name_list_add(&missing, index->shards[i]);
            aq_free(path);
        }
        if (status == AQ_OK && missing.n > 0) {
            aq_fail_at(err, AQ_ERR_FORMAT, index_path, NULL, "%zu shard%s missing: %s", missing.n, missing.n == 1 ? " is" : "s are",
                       aq_name_list_text(&missing));
            aq_hint(err, "complete the download");
            return AQ_ERR_FORMAT;
        }
    }
    return status;
}

/* Which tensors are listed but not there, there but not listed, or listed for another shard. */
static aq_status compare(const aq_model *model, const shard_index *index, const aq_name_table *listed, const char *path, aq_error *err) {
    aq_name_list absent = {0}, unlisted = {0}, elsewhere = {0}, twice = {0};
    unsigned char *seen = aq_calloc(index->n_entries, 1);
    if (!seen) return aq_fail_memory(err, index->n_entries, "a shard index");
    for (size_t f = 0; f < model->n_files; f++) {
        const aq_st_header *header = &model->files[f].header;
        for (size_t i = 0; i < header->n_tensors; i++) {
            const char *name = header->tensors[i].name;
            int64_t at = aq_name_table_find(listed, name);
            if (at < 0)
                aq_name_list_add(&unlisted, name);
            else if (seen[at]++)
                aq_name_list_add(&twice, name);
            else if (strcmp(index->entries[at].file, index->shards[f]) != 0)
                aq_name_list_add(&elsewhere, name);
            if (at >= 0) seen[at] = 1;
        }
    }
    for (size_t i = 0; i < index->n_entries; i++)
        if (!seen[i]) aq_name_list_add(&absent, index->entries[i].name);
    aq_free(seen);
    const struct {
        aq_name_list *list;
        const char *what;
    } checks[] = {{&twice, "in two shards"},
                  {&elsewhere, "in another shard than the index says"},
                  {&absent, "in the index but in no shard"},
                  {&unlisted, "in a shard but not in the index"}};
    for (size_t i = 0; i < 4; i++)
        if (checks[i].list->n > 0)
            return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "%zu tensors are %s: %s", checks[i].list->n, checks[i].what, aq_name_list_text(checks[i].list));
    return AQ_OK;
}

static aq_status check_total(aq_model *model, const shard_index *index, const char *path, aq_error *err) {
    uint64_t total = 0;
    char said[32], is[32];
    for (size_t f = 0; f < model->n_files; f++) total += model->files[f].map.size - model->files[f].header_bytes; /* sizes of existing files: no overflow */
    if (!index->has_total || index->total_size == total) return AQ_OK;
    return aq_model_warn(model, err, path, "total_size is %s, but the tensors take %s bytes", aq_format_count(said, index->total_size),
                         aq_format_count(is, total));
}

aq_status aq_index_open(aq_model *model, const char *index_path, const aq_model_options *options, aq_error *err) {
    shard_index index = {0};
    aq_name_table listed = {0};
    aq_name_list twice = {0};
    aq_file_map file;
    aq_status status = aq_file_map_open(&file, index_path, false, err);
    if (status != AQ_OK) return status;
    char count[32];
    if (file.size > options->limits.index_bytes)
        status = aq_fail_limit(err, index_path, NULL, "index_bytes", options->limits.index_bytes, "is %s bytes long", aq_format_count(count, file.size));
    if (status == AQ_OK) status = parse_index(&index, &file, model->index_hash, index_path, options, err);
    aq_file_map_close(&file);
    if (status == AQ_OK) status = aq_name_table_init(&listed, index.entries, sizeof *index.entries, index.n_entries, err);
    for (size_t i = 0; status == AQ_OK && i < index.n_entries; i++)
        if (aq_name_table_add(&listed, i) >= 0) aq_name_list_add(&twice, index.entries[i].name);
    if (twice.n > 0)
        status = aq_fail_at(err, AQ_ERR_FORMAT, index_path, NULL, "tensors appear more than once in \"weight_map\": %s", aq_name_list_text(&twice));
    if (status == AQ_OK) status = open_shards(model, &index, index_path, options, err);
    if (status == AQ_OK && index.shards) status = compare(model, &index, &listed, index_path, err);
    if (status == AQ_OK) status = check_total(model, &index, index_path, err);
    aq_name_table_free(&listed);
    aq_free(index.shards);
    aq_free(index.entries);
    aq_free(index.text);
    return status;
}

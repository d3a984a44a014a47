/* Opening a container: files, schema, and every row but its codes are read and checked (PQ01-PQ12 of the design); codes stay in the map. */
#include <arrowquant/store.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/mem.h"
#include "base/size.h"
#include "store/extension.h"
#include "store/store_internal.h"

/* ---- small things that live as long as the store ---- */

void *aq_store_keep_zeros(aq_store *s, uint64_t size) {
    if (s->n_owned == s->owned_cap) {
        size_t cap = s->owned_cap ? 2 * s->owned_cap : 256;
        void **owned = aq_realloc(s->owned, cap, sizeof *owned);
        if (!owned) return NULL;
        s->owned = owned;
        s->owned_cap = cap;
    }
    void *zeros = aq_calloc(size, 1);
    return zeros ? s->owned[s->n_owned++] = zeros : NULL;
}

void *aq_store_keep(aq_store *s, const void *data, uint64_t size) {
    void *copy = aq_store_keep_zeros(s, size);
    if (copy && size) memcpy(copy, data, (size_t)size);
    return copy;
}

char *aq_store_keep_text(aq_store *s, const uint8_t *text, uint64_t size) {
    char *copy = size < SIZE_MAX ? aq_alloc(size + 1) : NULL, *kept;
    if (!copy) return NULL;
    if (size) memcpy(copy, text, (size_t)size);
    copy[size] = 0;
    kept = aq_store_keep(s, copy, size + 1);
    aq_free(copy);
    return kept;
}

/* ---- tensors by name ---- */

static size_t slot(const aq_store *s, const char *name) {
    size_t at = (size_t)XXH3_64bits(name, strlen(name)) & (s->table_size - 1);
    while (s->table[at] && strcmp(s->tensors[s->table[at] - 1].info.name, name) != 0) at = (at + 1) & (s->table_size - 1);
    return at;
}

static bool grow_table(aq_store *s) {
    if (s->table && 2 * (s->n_tensors + 1) <= s->table_size) return true;
    size_t size = s->table_size ? 2 * s->table_size : 256;
    uint32_t *table = aq_calloc(size, sizeof *table);
    if (!table) return false;
    aq_free(s->table);
    s->table = table;
    s->table_size = size;
    for (size_t i = 0; s->tensors && i < s->n_tensors; i++) s->table[slot(s, s->tensors[i].info.name)] = (uint32_t)(i + 1);
    return true;
}

int64_t aq_store_find(const aq_store *s, const char *name) { return s->table_size ? (int64_t)s->table[slot(s, name)] - 1 : -1; }

static bool same_tensor(const aq_store_tensor *a, const aq_store_tensor *b) {
    return a->quantized == b->quantized && strcmp(a->dtype, b->dtype) == 0 && strcmp(a->quant_type, b->quant_type) == 0 && a->shape.rank == b->shape.rank &&
           memcmp(a->shape.dims, b->shape.dims, sizeof a->shape.dims) == 0 &&
           (!a->quantized ||
            (a->spec.bits == b->spec.bits && a->spec.group_size == b->spec.group_size && a->spec.axis == b->spec.axis && a->spec.params == b->spec.params)) &&
           aq_extension_same(a, b);
}

static uint64_t units(const aq_store_tensor *t) { return t->quantized ? t->rows : t->num_params; }

static aq_status add_part(aq_store *s, const aq_store_tensor *info, aq_part *part, aq_error *err) {
    const char *file = s->files[part->file].path;
    aq_stored *last = s->n_tensors ? &s->tensors[s->n_tensors - 1] : NULL;
    bool next_part = last && strcmp(last->info.name, info->name) == 0 && part->row_begin > 0;
    if (s->n_parts == s->parts_cap) {
        size_t cap = s->parts_cap ? 2 * s->parts_cap : 64;
        aq_part *parts = aq_realloc(s->parts, cap, sizeof *parts);
        if (!parts) return aq_fail_memory(err, cap * sizeof *parts, "the tensor list");
        s->parts = parts;
        s->parts_cap = cap;
    }
    if (next_part) {
        const aq_part *before = &s->parts[s->n_parts - 1];
        if (!same_tensor(&last->info, info)) return aq_fail_at(err, AQ_ERR_FORMAT, file, info->name, "its parts contradict each other");
        uint64_t expected = before->row_begin + before->row_count;
        if (part->row_begin != expected)
            return aq_fail_at(err, AQ_ERR_FORMAT, file, info->name, "a part begins at %llu, expected %llu", (unsigned long long)part->row_begin,
                              (unsigned long long)expected);
        last->info.stored_bytes += info->stored_bytes;
        last->info.n_parts++;
    } else {
        if (part->row_begin != 0)
            return aq_fail_at(err, AQ_ERR_FORMAT, file, info->name, "its first part begins at %llu, expected 0", (unsigned long long)part->row_begin);
        if (aq_store_find(s, info->name) >= 0) return aq_fail_at(err, AQ_ERR_FORMAT, file, info->name, "is there twice");
        if (s->n_tensors >= AQ_LIMIT_TENSORS) return aq_fail_at(err, AQ_ERR_FORMAT, file, NULL, "there are more than %d tensors", AQ_LIMIT_TENSORS);
        if (!s->tensors || s->n_tensors == s->tensors_cap) {
            size_t cap = s->tensors_cap ? 2 * s->tensors_cap : 64;
            aq_stored *tensors = aq_realloc(s->tensors, cap, sizeof *tensors);
            if (!tensors) return aq_fail_memory(err, cap * sizeof *tensors, "the tensor list");
            s->tensors = tensors;
            s->tensors_cap = cap;
        }
        if (!grow_table(s)) return aq_fail_memory(err, 2 * s->table_size, "the tensor list");
        size_t at = slot(s, info->name);
        aq_stored *t = &s->tensors[s->n_tensors++];
        t->info = *info;
        t->info.n_parts = 1;
        t->info.file_index = part->file;
        t->first_part = s->n_parts;
        s->table[at] = (uint32_t)s->n_tensors;
    }
    s->parts[s->n_parts++] = *part;
    part->owned_data = part->owned_params = NULL;
    return AQ_OK;
}

aq_status aq_store_append_rows(aq_store *s, uint64_t n, aq_row_reader read, void *reader, aq_error *err) {
    aq_status status = AQ_OK;
    for (uint64_t i = 0; status == AQ_OK && i < n; i++) {
        aq_store_tensor tensor;
        aq_part part;
        status = read(reader, &tensor, &part, err);
        if (status == AQ_OK) status = add_part(s, &tensor, &part, err);
        aq_free(part.owned_data); /* what add_part has not taken */
        aq_free(part.owned_params);
    }
    return status;
}

aq_status aq_store_check_complete(const aq_store *s, aq_error *err) {
    for (size_t i = 0; i < s->n_tensors; i++) {
        const aq_stored *t = &s->tensors[i];
        const aq_part *last = &s->parts[t->first_part + t->info.n_parts - 1];
        uint64_t end = last->row_begin + last->row_count;
        if (end != units(&t->info))
            return aq_fail_at(err, AQ_ERR_FORMAT, s->files[last->file].path, t->info.name, "ends at %llu of %llu: a part is missing", (unsigned long long)end,
                              (unsigned long long)units(&t->info));
    }
    return AQ_OK;
}

/* ---- one file ---- */

static aq_status match_columns(aq_store_input *f, aq_error *err) {
    const carquet_schema_t *schema = carquet_reader_schema(f->reader);
    int32_t n = carquet_schema_num_columns(schema);
    if (n <= 0) return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "has no columns");
    if (n > AQ_LIMIT_COLUMNS) return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "has %d columns, over the limit of %d", (int)n, AQ_LIMIT_COLUMNS);
    for (int c = 0; c < COL_COUNT; c++) f->leaf[c] = -1;
    for (int32_t i = 0; i < n; i++) {
        char path[256];
        if (!aq_parquet_leaf_path(schema, i, path, sizeof path)) continue;
        for (int c = 0; c < COL_COUNT; c++) {
            if (strcmp(path, aq_columns[c].path) != 0) continue;
            if (f->leaf[c] >= 0) return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "column %s is there twice", path);
            f->leaf[c] = i;
        }
    }
    return AQ_OK;
}

/* Types and nesting of the columns that are read. */
static aq_status check_types(const aq_store_input *f, aq_error *err) {
    const carquet_schema_t *schema = carquet_reader_schema(f->reader);
    for (int c = 0; c < COL_COUNT; c++) {
        int32_t leaf = f->leaf[c];
        if (leaf < 0) {
            if (aq_columns[c].required) return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "column %s is missing", aq_columns[c].path);
            continue;
        }
        int16_t rep = carquet_schema_max_rep_level(schema, leaf);
        if (carquet_schema_column_type(schema, leaf) != aq_columns[c].type || rep != (aq_columns[c].is_list ? 1 : 0))
            return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "column %s has another type than this format gives it", aq_columns[c].path);
        if (aq_columns[c].is_list && carquet_schema_max_def_level(schema, leaf) < 1)
            return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "column %s is no list of the usual form", aq_columns[c].path);
    }
    return AQ_OK;
}

/* "2.1": major 2 is read whatever the minor. */
static aq_status check_version(aq_store *s, const aq_store_input *f, const char *version, aq_error *err) {
    char *end;
    unsigned long major = version[0] >= '0' && version[0] <= '9' ? strtoul(version, &end, 10) : 0;
    if (major == 0 || (*end != '.' && *end != 0))
        return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "its schema version is not readable, expected one like %s", AQ_SCHEMA_VERSION);
    if (major != 2) {
        const char *writer = carquet_reader_find_metadata(f->reader, "arrowquant.version");
        char shown[64];
        aq_escape(shown, sizeof shown, writer ? writer : "", writer ? strnlen(writer, 32) : 0);
        aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "has schema version %lu, this program reads version 2: needs ArrowQuant \xE2\x89\xA5 %s", major,
                   shown[0] ? shown : "1.0");
        aq_hint(err, "install a newer ArrowQuant");
        return AQ_ERR_FORMAT;
    }
    if (!s->schema_version && !(s->schema_version = aq_strdup(version))) return aq_fail_memory(err, 8, "the version");
    return AQ_OK;
}

static aq_status open_input(aq_store *s, aq_store_input *f, aq_error *err) {
    aq_parquet parquet;
    aq_status status = aq_parquet_open(&parquet, f->path, err);
    f->map = parquet.map;
    f->reader = parquet.reader;
    if (status == AQ_OK) status = match_columns(f, err);
    if (status != AQ_OK) return status;
    const char *version = carquet_reader_find_metadata(f->reader, "arrowquant.schema_version");
    f->kind = version ? AQ_FILE_V2_EXTENDED : f->leaf[COL_LAYER_NAME] >= 0 ? AQ_FILE_V2_BASE : AQ_FILE_V1;
    if (f->kind != AQ_FILE_V2_EXTENDED) return aq_store_read_legacy(s, (size_t)(f - s->files), err);
    status = check_version(s, f, version, err);
    if (status == AQ_OK) status = check_types(f, err);
    if (status != AQ_OK) return status;
    const char *config = carquet_reader_find_metadata(f->reader, "arrowquant.config");
    if (config && !s->config_json && !(s->config_json = aq_strdup(config))) return aq_fail_memory(err, 1, "the configuration");
    const char *modality = carquet_reader_find_metadata(f->reader, "arrowquant.modality");
    if (modality && s->modality == AQ_MODALITY_UNKNOWN) s->modality = aq_modality_from_name(modality);
    return aq_store_read_rows(s, (size_t)(f - s->files), err);
}

/* ---- the folder ---- */

/* Says metadata.json that the folder is a container? Source models have a file of that name, too. */
static bool says_container(const char *folder) {
    char *path = aq_path_join(folder, "metadata.json");
    json_t *root = NULL;
    bool says = path && aq_path_is_file(path) && aq_json_load(&root, path, AQ_LIMIT_CONFIG_BYTES, 64, NULL) == AQ_OK;
    const char *format = says ? json_string_value(json_object_get(root, "format")) : NULL;
    says = format && strcmp(format, "arrowquant") == 0 && json_is_object(json_object_get(root, "files"));
    json_decref(root);
    aq_free(path);
    return says;
}

bool aq_store_is_container(const char *path) {
    if (!aq_path_is_dir(path)) return aq_path_is_file(path) && aq_text_ends_with(path, ".parquet");
    aq_names names = {0};
    bool found = false, ours = false, safetensors = false;
    if (aq_list_dir(&names, path, 1000000, NULL) != AQ_OK) return false;
    for (size_t i = 0; i < names.n_names; i++) {
        const char *name = names.names[i];
        unsigned index, n;
        int end = 0;
        ours |= sscanf(name, "model-%5u-of-%5u.parquet%n", &index, &n, &end) == 2 && end && !name[end];
        found |= aq_text_ends_with(name, ".parquet") && strcmp(name, "calibration.parquet") != 0;
        safetensors |= aq_text_ends_with(name, ".safetensors");
    }
    aq_names_free(&names);
    if (ours || (found && !safetensors)) return true; /* other tables may lie beside the weights of a source model */
    return says_container(path);                      /* its weights are missing, which opening tells */
}

static aq_status fail_missing(const char *folder, const char *file, aq_error *err) {
    aq_fail_at(err, AQ_ERR_FORMAT, folder, NULL, "its file \"%.200s\" is missing", file);
    aq_hint(err, "copy the whole folder again from where it came");
    return AQ_ERR_FORMAT;
}

/* model-00001-of-00003.parquet: all three are there. The names are sorted. */
static aq_status check_shards(const aq_names *names, const char *path, aq_error *err) {
    unsigned n_files = 0, seen = 0;
    char missing[64] = "";
    for (size_t i = 0; i < names->n_names; i++) {
        unsigned index, n;
        int end = 0;
        if (sscanf(names->names[i], "model-%5u-of-%5u.parquet%n", &index, &n, &end) != 2 || !end || names->names[i][end]) continue;
        if (n_files && n != n_files) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "holds files of two models, one of %u and one of %u files", n_files, n);
        n_files = n;
        if (++seen != index && !missing[0]) snprintf(missing, sizeof missing, "model-%05u-of-%05u.parquet", seen, n);
    }
    if (seen == n_files) return AQ_OK;
    if (!missing[0]) snprintf(missing, sizeof missing, "model-%05u-of-%05u.parquet", seen + 1, n_files);
    return fail_missing(path, missing, err);
}

static aq_status list_inputs(aq_store *s, aq_error *err) {
    aq_names names = {0};
    aq_status status = AQ_OK;
    if (s->folder) {
        status = aq_list_dir(&names, s->path, 1000000, err);
        if (status == AQ_OK) status = check_shards(&names, s->path, err);
    }
    size_t n = s->folder ? names.n_names : 1;
    if (status == AQ_OK && !(s->files = aq_calloc(n + 1, sizeof *s->files))) status = aq_fail_memory(err, n * sizeof *s->files, "the file list");
    for (size_t i = 0; status == AQ_OK && s->files && i < n; i++) {
        if (s->folder && (!aq_text_ends_with(names.names[i], ".parquet") || strcmp(names.names[i], "calibration.parquet") == 0)) continue;
        aq_store_input *f = &s->files[s->n_files++];
        f->map.fd = -1;
        f->path = s->folder ? aq_path_join(s->path, names.names[i]) : aq_strdup(s->path);
        if (!f->path) status = aq_fail_memory(err, 1, "a path");
    }
    aq_names_free(&names);
    if (status == AQ_OK && s->n_files == 0) {
        status = aq_fail_at(err, AQ_ERR_FORMAT, s->path, NULL, "holds no Parquet file");
        aq_hint(err, "a container is the folder that quantize writes; source models are inspected and quantized");
    }
    return status;
}

static bool is_plain(const char *name) {
    if (!name[0] || name[0] == '/' || strchr(name, '\\')) return false;
    for (const char *p = name; *p;) {
        size_t n = strcspn(p, "/");
        if (n == 0 || (n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.')) return false;
        p += n + (p[n] == '/');
    }
    return name[strlen(name) - 1] != '/';
}

static aq_status check_listed(const aq_store *s, const char *file, aq_error *err) {
    char *path = aq_path_join(s->path, file);
    if (!path) return aq_fail_memory(err, strlen(file), "a path");
    aq_status status = aq_path_exists(path) ? AQ_OK : fail_missing(s->path, file, err);
    aq_free(path);
    return status;
}

/* metadata.json: its text, the modality, and which files belong to the container. */
static aq_status read_metadata(aq_store *s, aq_error *err) {
    if (!s->folder) return AQ_OK;
    char *path = aq_path_join(s->path, "metadata.json");
    if (!path) return aq_fail_memory(err, 1, "a path");
    aq_status status = AQ_OK;
    json_t *root = NULL;
    uint64_t size;
    if (!aq_path_exists(path)) goto done;
    status = aq_file_read(&s->metadata_json, &size, path, AQ_LIMIT_CONFIG_BYTES, err);
    if (status == AQ_OK) status = aq_json_parse(&root, s->metadata_json, size, 64, path, err);
    if (status != AQ_OK) goto done;
    const char *modality = json_string_value(json_object_get(root, "modality")), *key;
    if (modality) s->modality = aq_modality_from_name(modality);
    json_t *files = json_object_get(root, "files"), *value;
    size_t n = json_is_object(files) ? json_object_size(files) : 0;
    s->side_files = aq_calloc(n + 1, sizeof *s->side_files);
    s->side_paths = aq_calloc(n + 1, sizeof *s->side_paths);
    if (!s->side_files || !s->side_paths) {
        status = aq_fail_memory(err, n, "the file list");
        goto done;
    }
    json_object_foreach(files, key, value) {
        if (!is_plain(key)) {
            status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "names a file that is not inside the folder");
            goto done;
        }
        if (aq_text_ends_with(key, ".parquet") && !strchr(key, '/')) {
            if ((status = check_listed(s, key, err)) != AQ_OK) goto done;
            continue;
        }
        s->side_files[s->n_side_files] = aq_strdup(key);
        s->side_paths[s->n_side_files] = aq_path_join(s->path, key);
        s->n_side_files++;
        if (!s->side_files[s->n_side_files - 1] || !s->side_paths[s->n_side_files - 1]) {
            status = aq_fail_memory(err, n, "the file list");
            goto done;
        }
    }
done:
    json_decref(root);
    aq_free(path);
    return status;
}

aq_status aq_store_open(aq_store **out, const char *path, aq_error *err) {
    *out = NULL;
    aq_error_clear(err);
    aq_store *s = aq_calloc(1, sizeof *s);
    if (!s) return aq_fail_memory(err, sizeof *s, "the container");
    aq_status status = AQ_OK;
    s->folder = aq_path_is_dir(path);
    s->path = aq_strdup(path);
    if (!s->path) status = aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK && !aq_path_exists(path)) status = aq_fail_io(err, ENOENT, path, "cannot open");
    if (status == AQ_OK) status = read_metadata(s, err);
    if (status == AQ_OK) status = list_inputs(s, err);
    for (size_t i = 0; status == AQ_OK && i < s->n_files; i++) status = open_input(s, &s->files[i], err);
    if (status == AQ_OK) status = aq_store_check_complete(s, err);
    if (status != AQ_OK) {
        aq_store_close(s);
        return status;
    }
    *out = s;
    return AQ_OK;
}

void aq_store_close(aq_store *s) {
    if (!s) return;
    for (size_t i = 0; i < s->n_parts; i++) {
        aq_free(s->parts[i].owned_data);
        aq_free(s->parts[i].owned_params);
    }
    for (size_t i = 0; i < s->n_files; i++) {
        carquet_reader_close(s->files[i].reader);
        if (s->files[i].map.data || s->files[i].map.fd >= 0) aq_file_map_close(&s->files[i].map);
        aq_free(s->files[i].path);
    }
    for (size_t i = 0; i < s->n_owned; i++) aq_free(s->owned[i]);
    for (size_t i = 0; i < s->n_side_files; i++) {
        aq_free(s->side_files[i]);
        aq_free(s->side_paths[i]);
    }
    aq_free(s->side_files);
    aq_free(s->side_paths);
    aq_free(s->owned);
    aq_free(s->files);
    aq_free(s->parts);
    aq_free(s->tensors);
    aq_free(s->table);
    aq_free(s->schema_version);
    aq_free(s->config_json);
    aq_free(s->metadata_json);
    aq_free(s->path);
    aq_free(s);
}

size_t aq_store_n_tensors(const aq_store *s) { return s->n_tensors; }
const aq_store_tensor *aq_store_tensor_at(const aq_store *s, size_t index) { return index < s->n_tensors ? &s->tensors[index].info : NULL; }
const char *aq_store_path(const aq_store *s) { return s->path; }
const char *aq_store_schema_version(const aq_store *s) { return s->schema_version ? s->schema_version : ""; }
const char *aq_store_config_json(const aq_store *s) { return s->config_json ? s->config_json : ""; }
const char *aq_store_metadata_json(const aq_store *s) { return s->metadata_json ? s->metadata_json : ""; }
aq_modality aq_store_modality(const aq_store *s) { return s->modality; }
size_t aq_store_n_files(const aq_store *s) { return s->n_files; }
const char *aq_store_file(const aq_store *s, size_t i) { return i < s->n_files ? s->files[i].path : NULL; }
size_t aq_store_n_side_files(const aq_store *s) { return s->n_side_files; }

uint64_t aq_store_size_bytes(const aq_store *s) {
    uint64_t total = 0;
    for (size_t i = 0; i < s->n_files; i++) total += s->files[i].map.size;
    return total;
}

const char *aq_store_side_file(const aq_store *s, size_t i, const char **absolute_path) {
    if (i >= s->n_side_files) return NULL;
    if (absolute_path) *absolute_path = s->side_paths[i];
    return s->side_files[i];
}

/* Configuration files (see config.h): a subset of YAML over libyaml's events, and JSON over jansson; both are one flat mapping of field names.
 *
 * YAML is read event by event without ever building a document, so that aliases cannot grow (CF01); what the subset leaves out is refused by name. Scalars are
 * read by the type of their field: `no`, `1_000`, `0o17` and the other readings that YAML versions disagree about are never numbers or booleans (CF03).
 */
#include "pipeline/config_fields.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define MAX_FILE (UINT64_C(1) << 20)
enum { MAX_JSON_DEPTH = 32, SOURCE_SIZE = 640 };

/* ---- YAML ---- */

typedef struct reader {
    yaml_parser_t parser;
    yaml_event_t event; /* the current one */
    bool has_event;
    const char *name; /* of the file */
    aq_error *err;
} reader;

/* "Failed to parse YAML: FILE:LINE:COLUMN" of the current event. */
static const char *place(const reader *r, yaml_mark_t mark, char out[SOURCE_SIZE]) {
    char file[512];
    aq_escape(file, sizeof file, r->name, strlen(r->name));
    snprintf(out, SOURCE_SIZE, "Failed to parse YAML: %s:%zu:%zu", file, mark.line + 1, mark.column + 1);
    return out;
}

static aq_status refuse(reader *r, const char *problem) {
    char source[SOURCE_SIZE];
    return aq_fail(r->err, AQ_ERR_USAGE, "%s: %s", place(r, r->event.start_mark, source), problem);
}

/* Anchors and tags of a node; NULL pointers when there are none. */
static aq_status refuse_properties(reader *r, const yaml_char_t *anchor, const yaml_char_t *tag) {
    if (anchor) return refuse(r, "anchors (&name) are not allowed");
    if (tag) return refuse(r, "tags (!name) are not allowed");
    return AQ_OK;
}

/* Moves to the next event and refuses what no configuration may hold. */
static aq_status advance(reader *r) {
    if (r->has_event) yaml_event_delete(&r->event);
    r->has_event = yaml_parser_parse(&r->parser, &r->event);
    if (!r->has_event) {
        char source[SOURCE_SIZE];
        yaml_mark_t mark = r->parser.problem_mark;
        if (r->parser.error == YAML_MEMORY_ERROR) return aq_fail_memory(r->err, MAX_FILE, "a configuration file");
        return aq_fail(r->err, AQ_ERR_USAGE, "%s: %s", place(r, mark, source), r->parser.problem ? r->parser.problem : "not YAML");
    }
    const yaml_event_t *e = &r->event;
    switch (e->type) {
    case YAML_ALIAS_EVENT: return refuse(r, "aliases (*name) are not allowed");
    case YAML_SCALAR_EVENT: return refuse_properties(r, e->data.scalar.anchor, e->data.scalar.tag);
    case YAML_SEQUENCE_START_EVENT: return refuse_properties(r, e->data.sequence_start.anchor, e->data.sequence_start.tag);
    case YAML_MAPPING_START_EVENT: return refuse_properties(r, e->data.mapping_start.anchor, e->data.mapping_start.tag);
    case YAML_DOCUMENT_START_EVENT:
        if (e->data.document_start.tag_directives.start != e->data.document_start.tag_directives.end) return refuse(r, "%TAG directives are not allowed");
        return AQ_OK;
    default: return AQ_OK;
    }
}

static const char *scalar_text(const reader *r) { return (const char *)r->event.data.scalar.value; }

static aq_status expect_scalar(reader *r, const char *problem) {
    if (r->event.type != YAML_SCALAR_EVENT) return refuse(r, problem);
    if (strlen(scalar_text(r)) != r->event.data.scalar.length) return refuse(r, "a zero character is not allowed");
    return AQ_OK;
}

/* Text as a whole number or number of JSON, which is what a plain decimal is; NULL when it is not. */
static json_t *plain_number(const char *text, bool whole) {
    if (text[0] != '-' && (text[0] < '0' || text[0] > '9')) return NULL; /* no lists or words */
    json_t *value = json_loads(text, JSON_DECODE_ANY, NULL);
    if (whole ? json_is_integer(value) : json_is_number(value)) return value;
    json_decref(value);
    return NULL;
}

/* The current scalar as a value of that type. A scalar in quotes is a text. What does not fit stays a text, which aq_config_coerce refuses. */
static json_t *scalar_value(const reader *r, aq_config_type type, bool nullable) {
    const char *text = scalar_text(r);
    json_t *value = NULL;
    if (r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE) {
        if (nullable && strcmp(text, "null") == 0) return json_null();
        if (type == AQ_CONFIG_BOOL && strcmp(text, "true") == 0) return json_true();
        if (type == AQ_CONFIG_BOOL && strcmp(text, "false") == 0) return json_false();
        if (type == AQ_CONFIG_INT || type == AQ_CONFIG_FLOAT) value = plain_number(text, type == AQ_CONFIG_INT);
    }
    return value ? value : json_string(text);
}

static aq_status read_sequence(reader *r, aq_config_type item, json_t *list) {
    aq_status status;
    while ((status = advance(r)) == AQ_OK && r->event.type != YAML_SEQUENCE_END_EVENT) {
        status = expect_scalar(r, "a list holds single values");
        if (status != AQ_OK) return status;
        if (json_array_append_new(list, scalar_value(r, item, false)) != 0) return aq_fail_memory(r->err, 64, "a configuration file");
    }
    return status;
}

/* Key of a mapping: the current scalar. */
static aq_status check_key(reader *r, const json_t *into) {
    char shown[128], problem[192];
    aq_status status = expect_scalar(r, "a key must be a name");
    if (status != AQ_OK) return status;
    const char *key = scalar_text(r);
    if (strcmp(key, "<<") == 0 && r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE) return refuse(r, "merge keys (<<) are not allowed");
    if (!json_object_get(into, key)) return AQ_OK;
    snprintf(problem, sizeof problem, "duplicate key \"%s\"", aq_escape(shown, sizeof shown, key, strlen(key)));
    return refuse(r, problem);
}

/* Names with whole numbers: layer_bit_widths. */
static aq_status read_mapping(reader *r, json_t *map) {
    aq_status status;
    while ((status = advance(r)) == AQ_OK && r->event.type != YAML_MAPPING_END_EVENT) {
        status = check_key(r, map);
        if (status != AQ_OK) return status;
        char *key = aq_strdup(scalar_text(r));
        if (!key) return aq_fail_memory(r->err, 64, "a configuration file");
        status = advance(r);
        if (status == AQ_OK) status = expect_scalar(r, "the bits of a layer are one number");
        if (status == AQ_OK && json_object_set_new(map, key, scalar_value(r, AQ_CONFIG_INT, false)) != 0)
            status = aq_fail_memory(r->err, 64, "a configuration file");
        aq_free(key);
        if (status != AQ_OK) return status;
    }
    return status;
}

/* The value that the current event starts, in the JSON form of the field. */
static aq_status read_value(reader *r, const aq_config_def *def, json_t **out) {
    switch (r->event.type) {
    case YAML_SCALAR_EVENT: {
        aq_status status = expect_scalar(r, "");
        if (status != AQ_OK) return status;
        if (scalar_text(r)[0] == 0 && r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE) return refuse(r, "the value is missing; write null for none");
        *out = scalar_value(r, def->field.type, def->field.nullable);
        return *out ? AQ_OK : aq_fail_memory(r->err, 64, "a configuration file");
    }
    case YAML_SEQUENCE_START_EVENT:
        *out = json_array();
        return *out ? read_sequence(r, def->field.type == AQ_CONFIG_INT_LIST ? AQ_CONFIG_INT : AQ_CONFIG_STRING, *out) : aq_fail_memory(r->err, 64, "a list");
    case YAML_MAPPING_START_EVENT: *out = json_object(); return *out ? read_mapping(r, *out) : aq_fail_memory(r->err, 64, "a map");
    default: return refuse(r, "a value is missing");
    }
}

/* One `key: value`, the key being the current event. Checked at once, so that a message has the value's place. */
static aq_status read_field(reader *r, json_t *object) {
    char source[SOURCE_SIZE];
    aq_status status = check_key(r, object);
    if (status != AQ_OK) return status;
    int index = aq_config_field_find(scalar_text(r), NULL);
    if (index < 0) return aq_config_unknown_key(scalar_text(r), place(r, r->event.start_mark, source), r->err);
    const aq_config_def *def = &aq_config_defs[index];
    status = advance(r);
    if (status != AQ_OK) return status;
    place(r, r->event.start_mark, source);
    json_t *value = NULL, *kept = NULL;
    status = read_value(r, def, &value);
    if (status == AQ_OK) status = aq_config_coerce(def, value, source, &kept, r->err);
    if (status == AQ_OK) status = aq_config_check(def, kept, source, r->err);
    if (status == AQ_OK && json_object_set(object, def->field.name, kept) != 0) status = aq_fail_memory(r->err, 64, "a configuration file");
    json_decref(value);
    json_decref(kept);
    return status;
}

/* Stream, one document, one mapping, end. An empty document is an empty mapping. */
static aq_status read_stream(reader *r, json_t *object) {
    aq_status status = advance(r); /* stream start */
    if (status == AQ_OK) status = advance(r);
    if (status != AQ_OK || r->event.type == YAML_STREAM_END_EVENT) return status;
    status = advance(r);
    if (status != AQ_OK) return status;
    bool empty = r->event.type == YAML_SCALAR_EVENT && r->event.data.scalar.length == 0 && r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    if (!empty && r->event.type != YAML_MAPPING_START_EVENT) return refuse(r, "the file must be a mapping of field names to values");
    while (!empty && (status = advance(r)) == AQ_OK && r->event.type != YAML_MAPPING_END_EVENT) {
        status = read_field(r, object);
        if (status != AQ_OK) return status;
    }
    if (status == AQ_OK) status = advance(r); /* document end */
    if (status == AQ_OK) status = advance(r);
    if (status == AQ_OK && r->event.type != YAML_STREAM_END_EVENT) status = refuse(r, "a second document is not allowed");
    return status;
}

static aq_status parse_yaml(json_t *object, const char *text, size_t size, const char *name, aq_error *err) {
    reader r = {.name = name, .err = err};
    if (!yaml_parser_initialize(&r.parser)) return aq_fail_memory(err, sizeof r, "a configuration file");
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, size);
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    aq_status status = read_stream(&r, object);
    if (r.has_event) yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    return status;
}

/* ---- JSON ---- */

/* Line and column of a key of the outermost object; text is valid JSON. jansson keeps no places. */
static void find_key(const char *text, size_t size, const char *key, int *line, int *column) {
    size_t n = strlen(key), line_start = 0, depth = 0;
    *line = 1;
    for (size_t i = 0; i < size; i++) {
        if (text[i] == '\n') {
            ++*line;
            line_start = i + 1;
        } else if (text[i] == '{' || text[i] == '[') {
            depth++;
        } else if (text[i] == '}' || text[i] == ']') {
            depth--;
        } else if (text[i] == '"') {
            size_t start = i++;
            while (i < size && text[i] != '"') i += text[i] == '\\' ? 2 : 1;
            size_t after = i + 1;
            while (after < size && strchr(" \t\r\n", text[after])) after++;
            *column = (int)(start - line_start) + 1;
            if (depth == 1 && i - start - 1 == n && memcmp(text + start + 1, key, n) == 0 && after < size && text[after] == ':') return;
        }
    }
    *column = 1; /* a key written with escapes */
}

/* Coerces and checks one member, replacing it by its kept form. */
static aq_status check_member(json_t *object, const char *key, json_t *value, const char *text, size_t size, const char *name, aq_error *err) {
    char file[512], source[SOURCE_SIZE];
    int line, column, index = aq_config_field_find(key, NULL);
    find_key(text, size, key, &line, &column);
    aq_escape(file, sizeof file, name, strlen(name));
    snprintf(source, sizeof source, "Failed to parse JSON: %s:%d:%d", file, line, column);
    if (index < 0) return aq_config_unknown_key(key, source, err);
    json_t *kept;
    aq_status status = aq_config_coerce(&aq_config_defs[index], value, source, &kept, err);
    if (status == AQ_OK) status = aq_config_check(&aq_config_defs[index], kept, source, err);
    if (status == AQ_OK && json_object_set(object, key, kept) != 0) status = aq_fail_memory(err, 64, "a configuration file");
    json_decref(kept);
    return status;
}

static aq_status parse_json(json_t *object, const char *text, size_t size, const char *name, aq_error *err) {
    json_t *root;
    aq_status status = aq_json_parse(&root, text, size, MAX_JSON_DEPTH, name, err);
    if (status != AQ_OK) {
        if (status != AQ_ERR_FORMAT) return status;
        aq_context(err, "Failed to parse JSON");
        if (err) err->code = AQ_ERR_USAGE;
        return AQ_ERR_USAGE;
    }
    if (!json_is_object(root)) status = aq_fail_at(err, AQ_ERR_USAGE, name, NULL, "Failed to parse JSON: the file must be an object of field names and values");
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) {
        if (status == AQ_OK) status = check_member(object, key, value, text, size, name, err);
    }
    json_decref(root);
    return status;
}

/* ---- into a configuration ---- */

typedef aq_status (*parser)(json_t *object, const char *text, size_t size, const char *name, aq_error *err);

static aq_status load(aq_config *config, parser parse, const char *text, size_t size, const char *name, bool with_profile, aq_error *err) {
    if (size > MAX_FILE)
        return aq_fail_at(err, AQ_ERR_USAGE, name, NULL, "a configuration file of %zu bytes, the limit is %llu", size, (unsigned long long)MAX_FILE);
    json_t *object = json_object();
    if (!object) return aq_fail_memory(err, 64, "a configuration file");
    aq_status status = parse(object, text, size, name, err);
    if (status == AQ_OK) status = aq_config_assign_object(config, object, with_profile, err);
    json_decref(object);
    if (status != AQ_OK && err) aq_escape(err->file, sizeof err->file, name, strlen(name));
    return status;
}

aq_status aq_config_load_yaml(aq_config *config, const char *text, size_t size, const char *name, aq_error *err) {
    return load(config, parse_yaml, text, size, name, true, err);
}

aq_status aq_config_load_json(aq_config *config, const char *text, size_t size, const char *name, aq_error *err) {
    return load(config, parse_json, text, size, name, true, err);
}

aq_status aq_config_load_file_as(aq_config *config, const char *path, bool with_profile, aq_error *err) {
    char *text;
    uint64_t size;
    aq_status status = aq_file_read(&text, &size, path, MAX_FILE, err);
    if (status != AQ_OK) {
        aq_context(err, "Failed to read config file");
        return status;
    }
    status = load(config, aq_text_ends_with(path, ".json") ? parse_json : parse_yaml, text, (size_t)size, path, with_profile, err);
    aq_free(text);
    return status;
}

aq_status aq_config_load_file(aq_config *config, const char *path, aq_error *err) { return aq_config_load_file_as(config, path, true, err); }

/* ---- YAML out ---- */

static bool write_code_point(FILE *out, uint32_t c) {
    if (c == '"' || c == '\\') return fprintf(out, "\\%c", (char)c) > 0;
    if (c >= 0x20 && c < 0x7F) return fputc((int)c, out) != EOF;
    return fprintf(out, c > 0xFFFF ? "\\U%08X" : "\\u%04X", (unsigned)c) > 0;
}

/* In double quotes, everything outside ASCII escaped. Values are valid UTF-8 (jansson keeps no other). */
static bool write_quoted(FILE *out, const char *text) {
    bool ok = fputc('"', out) != EOF;
    for (const unsigned char *p = (const unsigned char *)text; *p && ok;) {
        int n = p[0] < 0xC0 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
        uint32_t c = n == 1 ? p[0] : p[0] & (0x7Fu >> n);
        for (int i = 1; i < n; i++) c = c << 6 | (p[i] & 0x3Fu);
        p += n;
        ok = write_code_point(out, c);
    }
    return ok && fputc('"', out) != EOF;
}

static bool write_list(FILE *out, const json_t *list) {
    bool ok = json_array_size(list) > 0 || fputs(" []", out) != EOF;
    for (size_t i = 0; i < json_array_size(list) && ok; i++) {
        const json_t *item = json_array_get(list, i);
        ok = fputs("\n  - ", out) != EOF;
        if (ok) ok = json_is_string(item) ? write_quoted(out, json_string_value(item)) : fprintf(out, "%lld", (long long)json_integer_value(item)) > 0;
    }
    return ok;
}

static bool write_map(FILE *out, json_t *map) {
    const char *key;
    json_t *value;
    bool ok = json_object_size(map) > 0 || fputs(" {}", out) != EOF;
    json_object_foreach(map, key, value) {
        ok = ok && fputs("\n  ", out) != EOF && write_quoted(out, key) && fprintf(out, ": %lld", (long long)json_integer_value(value)) > 0;
    }
    return ok;
}

static bool write_value(FILE *out, const aq_config_def *def, json_t *value) {
    if (json_is_array(value)) return write_list(out, value);
    if (json_is_object(value)) return write_map(out, value);
    if (fputc(' ', out) == EOF) return false;
    if (def->field.type == AQ_CONFIG_STRING && json_is_string(value)) return write_quoted(out, json_string_value(value));
    if (json_is_string(value)) return fputs(json_string_value(value), out) != EOF;
    char *text = aq_config_value_text(value);
    bool ok = text && fputs(text, out) != EOF;
    free(text);
    return ok;
}

char *aq_config_to_yaml(const aq_config *config) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    bool ok = out != NULL;
    for (size_t i = 0; i < aq_config_n_defs && ok; i++)
        ok = fprintf(out, "%s:", aq_config_defs[i].field.name) > 0 && write_value(out, &aq_config_defs[i], config->values[i]) && fputc('\n', out) != EOF;
    if (out) ok = fclose(out) == 0 && ok;
    if (ok) return text;
    free(text);
    return NULL;
}

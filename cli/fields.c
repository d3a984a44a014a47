/* Options made from the configuration's fields (see fields.h). A field whose own name is a word of the table already (min_accuracy, fail_fast, method …)
 * gets no second one; the others are added under "Fields", so that everything a file can say can be said on the command line.
 */
#include "fields.h"

#include <stdio.h>
#include <string.h>

#include <arrowquant/config.h>

enum { MOST_FIELDS = 96, NAME_SIZE = 48, HELP_SIZE = 320 };

/* Names and words live as long as the program. */
static struct {
    bool made;
    size_t n;
    cli_option options[2 * MOST_FIELDS];
    char names[2 * MOST_FIELDS][NAME_SIZE];
    char words[MOST_FIELDS][80];
    char help[MOST_FIELDS][HELP_SIZE];
} made;

/* "edge, local, or cloud" becomes "edge|local|cloud"; false when the text is not a plain list of words. */
static bool words_of(char *out, size_t size, const char *values) {
    size_t used = 0;
    for (const char *at = values; *at;) {
        at += strspn(at, " ,'\"");
        if (strncmp(at, "or ", 3) == 0) at += 3;
        at += strspn(at, " ,'\"");
        size_t n = strspn(at, "abcdefghijklmnopqrstuvwxyz0123456789_-");
        if (n == 0) return *at == 0 && used > 0;
        if (used + n + 2 > size) return false;
        if (used) out[used++] = '|';
        memcpy(out + used, at, n);
        used += n;
        out[used] = 0;
        at += n;
    }
    return used > 0;
}

/* "Bits per weight." becomes "bits per weight (4)": the sentence as the other options write it, with the default. */
static void write_help(char *out, const aq_config_field *field, const aq_config *presets) {
    char *preset = presets ? aq_config_get_json(presets, field->name) : NULL;
    const char *shown = preset ? preset : "";
    size_t n = strlen(shown);
    if (n >= 2 && shown[0] == '"') shown++, n -= 2;
    if (strcmp(shown, "null") == 0 || strcmp(shown, "[]") == 0 || strcmp(shown, "{}") == 0) n = 0;
    snprintf(out, HELP_SIZE, "%s%s%.*s%s", field->help, n ? " (" : "", (int)n, shown, n ? ")" : "");
    size_t end = strlen(field->help);
    if (end > 0 && end < HELP_SIZE && out[end - 1] == '.') memmove(out + end - 1, out + end, strlen(out + end) + 1);
    if (out[0] >= 'A' && out[0] <= 'Z' && !(out[1] >= 'A' && out[1] <= 'Z')) out[0] = (char)(out[0] - 'A' + 'a');
    aq_config_free_text(preset);
}

static void add(const aq_config_field *field, const char *prefix, const char *name, const char *set, const char *words, const char *help) {
    if (made.n == sizeof made.options / sizeof made.options[0]) return;
    char *text = made.names[made.n];
    if (snprintf(text, NAME_SIZE, "%s%s", prefix, name) >= NAME_SIZE) return;
    for (char *at = text; *at; at++)
        if (*at == '_') *at = '-';
    static const char *const kinds[] = {
        [AQ_CONFIG_INT] = "N",
        [AQ_CONFIG_FLOAT] = "X",
        [AQ_CONFIG_BOOL] = NULL,
        [AQ_CONFIG_ENUM] = "NAME",
        [AQ_CONFIG_STRING] = "TEXT",
        [AQ_CONFIG_STRING_LIST] = "TEXT",
        [AQ_CONFIG_BITS_MAP] = "NAME=BITS",
        [AQ_CONFIG_INT_LIST] = "N,...",
    };
    bool is_switch = field->type == AQ_CONFIG_BOOL && strcmp(set, "false") == 0;
    made.options[made.n++] = (cli_option){
        .name = text,
        .value = is_switch                       ? NULL
                 : field->type == AQ_CONFIG_BOOL ? "true|false"
                                                 : kinds[field->type],
        .words = words,
        .field = field->name,
        .set = set,
        .repeat = field->type == AQ_CONFIG_STRING_LIST || field->type == AQ_CONFIG_BITS_MAP,
        .optional_value = field->type == AQ_CONFIG_BOOL && !is_switch,
        .group = GROUP_FIELDS,
        .commands = "quantize",
        .help = help,
    };
}

static bool is_taken(const char *field) {
    char name[NAME_SIZE];
    snprintf(name, sizeof name, "%s", field);
    for (char *at = name; *at; at++)
        if (*at == '_') *at = '-';
    for (size_t i = 0; i < cli_n_table_options(); i++)
        if (strcmp(cli_option_at(i)->name, name) == 0) return true;
    return false;
}

static void make(void) {
    made.made = true; /* first: is_taken looks at the table, not at these */
    aq_config *presets = aq_config_create();
    for (size_t i = 0; i < aq_config_n_fields() && i < MOST_FIELDS; i++) {
        const aq_config_field *field = aq_config_field_at(i);
        bool is_bool = field->type == AQ_CONFIG_BOOL;
        bool listed = field->type == AQ_CONFIG_ENUM && field->values && words_of(made.words[i], sizeof made.words[i], field->values);
        const char *opposite = "the opposite";
        if (!is_taken(field->name)) {
            write_help(made.help[i], field, presets);
            add(field, "", field->name, "true", is_bool ? "true|false" : listed ? made.words[i] : NULL, made.help[i]);
        } else {
            snprintf(made.help[i], sizeof made.help[i], "turns %s off, where a profile, file or variable turned it on", field->name);
            opposite = made.help[i];
        }
        if (is_bool) add(field, "no-", strncmp(field->name, "enable_", 7) == 0 ? field->name + 7 : field->name, "false", NULL, opposite);
    }
    aq_config_destroy(presets);
}

size_t cli_n_field_options(void) {
    if (!made.made) make();
    return made.n;
}

const cli_option *cli_field_option_at(size_t index) { return &made.options[index]; }

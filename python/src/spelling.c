/* Options in the library's texts, spelt as Python's.
 *
 * The library's messages and hints name a setting as the command line does, with its value after a sign: "--overwrite", "--nonfinite=keep", "--target-size".
 * Here the same setting is a keyword argument or a field: overwrite=True, nonfinite='keep', target_size. So every text passes through this one function
 * before Python sees it. What is no setting of Python stays as it is (--limit). */
#include "aqpy.h"

#include <ctype.h>
#include <string.h>

/* Keywords that are no fields of the configuration. */
static const struct {
    const char *option, *keyword;
    bool is_switch;
} others[] = {
    {"against", "against", false},
    {"allow_unmatched", "allow_unmatched", true},
    {"bits", "bits", false},
    {"calib", "calib", false},
    {"component", "component", false},
    {"dtype", "dtype", false},
    {"follow_symlinks", "follow_symlinks", true},
    {"group", "group", false},
    {"lora", "lora", false},
    {"max_memory", "max_memory", false},
    {"mkdir", "mkdir", true},
    {"overwrite", "overwrite", true},
    {"plan", "plan", false},
    {"restart", "restart", true},
    {"samples", "samples", false},
    {"shape", "sample_shape", false},
    {"skip_unknown_dtype", "skip_unknown_dtype", true},
    {"source", "source", false},
    {"strict", "strict", true},
    {"target_size", "target_size", false},
    {"threads", "threads", false},
    {"time_groups", "time_groups", false},
    {"variant", "variant", false},
};

/* The keyword of an option that is written with underscores, or NULL. */
static const char *keyword_of(const char *option, bool *is_switch) {
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        *is_switch = others[i].is_switch;
        if (strcmp(others[i].option, option) == 0) return others[i].keyword;
    }
    int field = aq_config_field_find(option, NULL);
    if (field < 0) return NULL;
    *is_switch = aq_config_field_at((size_t)field)->type == AQ_CONFIG_BOOL;
    return aq_config_field_at((size_t)field)->name;
}

/* A buffer that is filled as far as it goes; the rest of the text is left out. */
typedef struct page {
    char *at, *end;
} page;

static void put(page *p, const char *text, size_t n) {
    size_t room = (size_t)(p->end - p->at);
    if (n > room) n = room;
    memcpy(p->at, text, n);
    p->at += n;
}
static void put_text(page *p, const char *text) { put(p, text, strlen(text)); }

/* Puts the option that begins at `text` ("--...") and returns how much of it was used; 0 when it is none of Python's. */
static size_t put_option(page *p, const char *text) {
    char name[48] = "";
    size_t n = 0, used = 2;
    for (; n + 1 < sizeof name && (islower((unsigned char)text[used]) || text[used] == '-'); used++) name[n++] = text[used] == '-' ? '_' : text[used];
    bool is_switch, negated = strncmp(name, "no_", 3) == 0;
    const char *keyword = n ? keyword_of(negated ? name + 3 : name, &is_switch) : NULL;
    if (!keyword) return 0;
    put_text(p, keyword);
    if (text[used] != '=') {
        if (is_switch || negated) put_text(p, negated ? "=False" : "=True");
        return used;
    }
    /* A value; words in capitals stand for one. */
    const char *value = text + used + 1, *quote = isupper((unsigned char)*value) ? "" : "'";
    size_t length = strcspn(value, " ,;)");
    put_text(p, "=");
    put_text(p, quote);
    put(p, value, length);
    put_text(p, quote);
    return used + 1 + length;
}

PyObject *aqpy_spelled(const char *text) {
    char spelled[4096];
    page p = {spelled, spelled + sizeof spelled};
    for (const char *at = text; *at;) {
        bool begins = strncmp(at, "--", 2) == 0 && (at == text || strchr(" (\"'", at[-1]));
        size_t used = begins ? put_option(&p, at) : 0;
        if (used == 0) put(&p, at, used = 1);
        at += used;
    }
    return PyUnicode_DecodeUTF8(spelled, p.at - spelled, "replace"); /* names may have been cut inside a character: replaced, never an error */
}

PyDoc_STRVAR(spelled_doc, "spelled($module, text, /)\n--\n\nA text of the library with its options as Python spells them.\n");
static PyObject *spelled(PyObject *module, PyObject *text) {
    (void)module;
    const char *utf8 = PyUnicode_AsUTF8AndSize(text, NULL);
    return utf8 ? aqpy_spelled(utf8) : NULL;
}

static PyMethodDef functions[] = {
    {"spelled", spelled, METH_O, spelled_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_spelling(PyObject *module) { return PyModule_AddFunctions(module, functions); }

/* Which files of a folder are the weights.
 *
 * A candidate is a single file, an index with its shards, or shards without an index, all told from names:
 *     STEM[.VARIANT].safetensors                STEM.safetensors[.VARIANT].index.json, STEM[.VARIANT].safetensors.index[.VARIANT].json
 *     STEM[.VARIANT]-00001-of-00002[.VARIANT].safetensors
 * One candidate is taken; of several, none is guessed: --variant has to name one (IX07). A plain folder without a config may spread a model over
 * files of different stems; they are all read.
 */
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "base/error.h"
#include "base/mem.h"
#include "model/internal.h"

typedef enum candidate_kind { SINGLE, INDEX, SHARD_SET } candidate_kind;

typedef struct candidate {
    const char *file; /* of the listing; of a shard set its first shard */
    char *stem;       /* owned; the variant stands behind its NUL, or "" */
    const char *variant;
    candidate_kind kind;
} candidate;

typedef struct candidates {
    aq_names names;
    candidate *items;
    size_t n, capacity;
} candidates;

static bool has_suffix(const char *name, const char *const *suffixes, size_t n) {
    size_t len = strlen(name);
    for (size_t i = 0; i < n; i++) {
        size_t m = strlen(suffixes[i]);
        if (len >= m && strcasecmp(name + len - m, suffixes[i]) == 0) return true;
    }
    return false;
}

bool aq_is_pickle_name(const char *name) {
    static const char *const suffixes[] = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"};
    return has_suffix(name, suffixes, sizeof suffixes / sizeof *suffixes);
}

bool aq_is_weights_name(const char *name) {
    static const char *const suffixes[] = {".safetensors", ".gguf", ".parquet", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".bin.index.json"};
    return has_suffix(name, suffixes, sizeof suffixes / sizeof *suffixes) || aq_is_pickle_name(name) ||
           (strstr(name, ".safetensors.") && strstr(name, ".json"));
}

/* `-00001-of-00002` at p: the number of shards and their common suffix's place; 0 when it is none. */
static unsigned shard_count(const char *p) {
    unsigned number, count;
    int n = 0;
    if (strspn(p + 1, "0123456789") != 5 || sscanf(p, "-%5u-of-%5u%n", &number, &count, &n) != 2 || n != 15) return 0;
    return number >= 1 && number <= count ? count : 0;
}

static const char *shard_suffix(const char *name) {
    const char *p = strstr(name, "-of-");
    return p && p - name >= 6 && shard_count(p - 6) ? p - 6 : NULL;
}

static bool is_variant_word(const char *word) {
    static const char *const words[] = {"fp16", "bf16", "fp32", "fp8", "f16", "f32", "fp4", "nf4", "int8", "int4", "ema", "non_ema", "no_ema"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strcmp(word, words[i]) == 0) return true;
    return false;
}

/* Splits "STEM.fp16" at its last dot when a variant follows. */
static void split_variant(candidate *c) {
    char *dot = strrchr(c->stem, '.');
    if (c->variant[0] || !dot || !is_variant_word(dot + 1)) return;
    *dot = 0;
    c->variant = dot + 1;
}

/* Fills the candidate that a file name stands for; false when it is no weights file. `*stem` gets room for stem and variant. */
static bool parse_name(candidate *c, const char *name, char *stem) {
    const char *suffix = strstr(name, ".safetensors"), *shard = shard_suffix(name);
    if (!suffix || suffix == name) return false;
    const char *tail = suffix + strlen(".safetensors");
    size_t n = (size_t)(suffix - name);
    *c = (candidate){.file = name, .stem = stem, .variant = "", .kind = SINGLE};
    if (*tail && !aq_text_ends_with(tail, ".json")) return false;
    memcpy(stem, name, n);
    stem[n] = 0;
    if (*tail) { /* .index.json with a variant before or behind the word */
        size_t m = strlen(tail) - strlen(".json");
        char *word = stem + n + 1;
        const char *index = strstr(tail, ".index");
        if (!index) return false;
        c->kind = INDEX;
        if (index == tail)
            snprintf(word, m, "%.*s", (int)(m > 7 ? m - 7 : 0), tail + 7);
        else
            snprintf(word, m, "%.*s", (int)(index - tail - 1), tail + 1);
        if (word[0]) c->variant = word;
    } else if (shard && shard < suffix) {
        c->kind = SHARD_SET;
        memmove(stem + (shard - name), stem + (shard - name) + 15, n - (size_t)(shard - name) - 15 + 1);
    }
    split_variant(c);
    return true;
}

static bool same_weights(const candidate *a, const candidate *b) { return strcmp(a->stem, b->stem) == 0 && strcmp(a->variant, b->variant) == 0; }

/* Shards belong to their index, or to the first shard of their set. */
static bool belongs_to_another(const candidates *all, const candidate *c) {
    for (size_t i = 0; c->kind == SHARD_SET && i < all->n; i++)
        if (all->items[i].kind != SINGLE && same_weights(&all->items[i], c)) return true;
    return false;
}

/* Two passes: indexes and single files, then shards that no index claims. */
static aq_status collect(candidates *all, const char *dir, aq_error *err) {
    aq_status status = aq_list_dir(&all->names, dir, 1000000, err);
    for (int pass = 0; pass < 2 && status == AQ_OK; pass++) {
        for (size_t i = 0; i < all->names.n_names; i++) {
            candidate c;
            const char *name = all->names.names[i];
            char *stem = aq_alloc(strlen(name) + 8);
            candidate *items = stem ? aq_grow(all->items, &all->capacity, all->n, sizeof *items) : NULL;
            if (!items) {
                aq_free(stem);
                return aq_fail_memory(err, strlen(name) + sizeof *items, "a folder listing");
            }
            all->items = items;
            if (parse_name(&c, name, stem) && (c.kind == SHARD_SET) == (pass == 1) && !belongs_to_another(all, &c))
                items[all->n++] = c;
            else
                aq_free(stem);
        }
    }
    return status;
}

static void free_candidates(candidates *all) {
    for (size_t i = 0; i < all->n; i++) aq_free(all->items[i].stem);
    aq_free(all->items);
    aq_names_free(&all->names);
}

/* --variant names the variant or the file itself. */
static bool is_wanted(const candidate *c, const char *variant) { return !variant || strcmp(c->variant, variant) == 0 || strcmp(c->file, variant) == 0; }

static aq_status fail_ambiguous(const candidates *all, const char *dir, const char *variant, aq_error *err) {
    char text[1024];
    size_t at = 0, n = 0;
    text[0] = 0;
    for (size_t i = 0; i < all->n && at + 300 < sizeof text; i++) {
        char name[200], word[40];
        const candidate *c = &all->items[i];
        if (!is_wanted(c, variant)) continue;
        aq_escape(name, sizeof name, c->file, strlen(c->file));
        aq_escape(word, sizeof word, c->variant, strlen(c->variant));
        at += (size_t)snprintf(text + at, sizeof text - at, "%s%s%s%s%s", n++ ? ", " : "", name, word[0] ? " (variant " : "", word, word[0] ? ")" : "");
    }
    aq_fail_at(err, AQ_ERR_USAGE, dir, NULL, "holds several sets of weights: %s", text);
    aq_hint(err, "choose one with --variant=NAME, where NAME is a variant or one of these file names");
    return AQ_ERR_USAGE;
}

static aq_status fail_none(const candidates *all, const char *dir, const char *variant, aq_error *err) {
    bool pickle = false, gguf = false, parquet = false;
    char word[128];
    if (variant && all->n > 0) {
        fail_ambiguous(all, dir, NULL, err);
        char had[1024];
        snprintf(had, sizeof had, "%s", err ? err->message : "");
        aq_fail(err, AQ_ERR_USAGE, "no weights of variant \"%s\": %s", aq_escape(word, sizeof word, variant, strlen(variant)), had);
        return AQ_ERR_USAGE;
    }
    for (size_t i = 0; i < all->names.n_names; i++) {
        const char *name = all->names.names[i];
        pickle |= aq_is_pickle_name(name);
        gguf |= aq_text_ends_with(name, ".gguf");
        parquet |= aq_text_ends_with(name, ".parquet");
    }
    if (parquet) return aq_fail_container(err, dir);
    if (gguf) return aq_fail_gguf(err, dir);
    if (pickle) return aq_fail_pickle(err, dir);
    aq_fail_at(err, AQ_ERR_FORMAT, dir, NULL, "no .safetensors weights in this folder");
    aq_hint(err, "give a .safetensors file, an .index.json, or a diffusers or transformers folder");
    return AQ_ERR_FORMAT;
}

static aq_status add(aq_model *model, const char *dir, const char *name, const aq_model_options *options, aq_error *err) {
    char *path = aq_path_join(dir, name);
    return path ? aq_model_add_file(model, path, options, err) : aq_fail_memory(err, strlen(dir), "a path");
}

static aq_status fail_other_set(aq_error *err, const char *dir, const char *name, unsigned count) {
    char escaped[256];
    return aq_fail_at(err, AQ_ERR_FORMAT, dir, NULL, "%s is a shard of another set, expected one of %u", aq_escape(escaped, sizeof escaped, name, strlen(name)),
                      count);
}

/* Without an index the names themselves say whether all shards are there. */
static aq_status open_shard_set(aq_model *model, const candidates *all, const candidate *wanted, const char *dir, const aq_model_options *options,
                                aq_error *err) {
    unsigned count = shard_count(shard_suffix(wanted->file)), n = 0;
    char *stem = aq_alloc(4096);
    if (!stem) return aq_fail_memory(err, 4096, "a name");
    aq_status status = count > options->limits.n_shards ? aq_fail_limit(err, dir, NULL, "n_shards", options->limits.n_shards, "%u shards", count) : AQ_OK;
    for (size_t i = 0; i < all->names.n_names && status == AQ_OK; i++) {
        candidate c;
        const char *name = all->names.names[i];
        if (strlen(name) > 4000 || !parse_name(&c, name, stem) || c.kind != SHARD_SET || !same_weights(&c, wanted)) continue;
        if (shard_count(shard_suffix(name)) != count)
            status = fail_other_set(err, dir, name, count);
        else if ((status = add(model, dir, name, options, err)) == AQ_OK)
            n++;
    }
    aq_free(stem);
    if (status == AQ_OK && n != count) status = aq_fail_at(err, AQ_ERR_FORMAT, dir, NULL, "%u of %u shards are there, and no index", n, count);
    return status;
}

static aq_status open_candidate(aq_model *model, const candidates *all, const candidate *c, const char *dir, const aq_model_options *options, aq_error *err) {
    if (c->kind == SINGLE) return add(model, dir, c->file, options, err);
    if (c->kind == SHARD_SET) return open_shard_set(model, all, c, dir, options, err);
    char *path = aq_path_join(dir, c->file);
    aq_status status = path ? aq_index_open(model, path, options, err) : aq_fail_memory(err, strlen(dir), "a path");
    aq_free(path);
    return status;
}

/* Files of one model spread over several stems: single files without variants only. */
static bool is_spread(const candidates *all) {
    for (size_t i = 0; i < all->n; i++)
        if (all->items[i].kind != SINGLE || all->items[i].variant[0]) return false;
    return all->n > 1;
}

aq_status aq_weights_open(aq_model *model, const char *dir, bool plain_folder, const aq_model_options *options, aq_error *err) {
    candidates all = {0};
    const candidate *chosen = NULL;
    size_t n = 0;
    aq_status status = collect(&all, dir, err);
    for (size_t i = 0; i < all.n; i++) {
        if (!is_wanted(&all.items[i], options->variant)) continue;
        chosen = &all.items[i];
        n++;
    }
    if (status != AQ_OK) {
        /* reported */
    } else if (n == 0) {
        status = fail_none(&all, dir, options->variant, err);
    } else if (n == 1) {
        status = open_candidate(model, &all, chosen, dir, options, err);
    } else if (plain_folder && !options->variant && is_spread(&all)) {
        if (n > options->limits.n_shards) status = aq_fail_limit(err, dir, NULL, "n_shards", options->limits.n_shards, "%zu files of weights", n);
        for (size_t i = 0; i < all.n && status == AQ_OK; i++) status = add(model, dir, all.items[i].file, options, err);
    } else {
        status = fail_ambiguous(&all, dir, options->variant, err);
    }
    if (status == AQ_OK && chosen) {
        size_t size = strlen(chosen->stem) + sizeof ".safetensors";
        model->weights_name = aq_alloc(size);
        if (model->weights_name)
            snprintf(model->weights_name, size, "%s.safetensors", n == 1 ? chosen->stem : "model");
        else
            status = aq_fail_memory(err, size, "a name");
    }
    free_candidates(&all);
    return status;
}

/* Synthetic data sets: rows of random inputs for a model whose data are not at hand (see arrowquant/dataset.h).
 *
 * Random numbers: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) from the seed and the number of the sample; normal values by Marsaglia's polar method, written
 * with four decimals so that the last bit of a logarithm does not show. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <arrowquant/dataset.h>

#include "base/draft.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define LIMIT_CONFIG_BYTES (UINT64_C(16) << 20)
#define LIMIT_SAMPLES UINT64_C(1000000)
enum { DEFAULT_SAMPLES = 128, DEFAULT_TIMESTEPS = 1000, MOST_TOKENS = 2048 };

void aq_synthetic_options_init(aq_synthetic_options *o) {
    memset(o, 0, sizeof *o);
    o->mask_token = -1;
}

/* ---- numbers ---- */

static uint64_t draw(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}
static double draw_uniform(uint64_t *state) { return (double)(draw(state) >> 11) * 0x1p-53; }
static double draw_normal(uint64_t *state) {
    for (;;) {
        double a = 2 * draw_uniform(state) - 1, b = 2 * draw_uniform(state) - 1, r = a * a + b * b;
        if (r > 0 && r < 1) return a * sqrt(-2 * log(r) / r);
    }
}

/* ---- what the model's configuration says ---- */

static uint64_t integer_of(const json_t *root, const char *const *keys) {
    for (; *keys; keys++) {
        const json_t *value = json_object_get(root, *keys);
        if (json_is_integer(value) && json_integer_value(value) > 0 && json_integer_value(value) <= UINT32_MAX) return (uint64_t)json_integer_value(value);
    }
    return 0;
}

/* The file as an object, or NULL: what cannot be read says nothing. */
static json_t *load(const char *folder, const char *name) {
    char *path = aq_path_join(folder, name);
    json_t *root = NULL;
    if (path && aq_path_is_file(path) && aq_json_load(&root, path, LIMIT_CONFIG_BYTES, 64, NULL) != AQ_OK) root = NULL;
    aq_free(path);
    return root;
}

/* [channels, height, width] from in_channels and sample_size, a number or a list. */
static void image_shape(const json_t *config, aq_shape *shape) {
    static const char *const channel_keys[] = {"in_channels", "num_channels", NULL};
    uint64_t channels = integer_of(config, channel_keys);
    const json_t *size = json_object_get(config, "sample_size"), *item;
    size_t i;
    if (channels == 0 || (!json_is_integer(size) && !json_is_array(size)) || json_array_size(size) > AQ_MAX_RANK - 1) return;
    aq_shape s = {.rank = 1, .dims = {channels}};
    if (json_is_integer(size)) {
        s.dims[1] = s.dims[2] = json_integer_value(size) > 0 ? (uint64_t)json_integer_value(size) : 0;
        s.rank = 3;
    }
    json_array_foreach(size, i, item) { s.dims[s.rank++] = json_integer_value(item) > 0 ? (uint64_t)json_integer_value(item) : 0; }
    *shape = s;
}

static void text_shape(const json_t *config, aq_synthetic_options *o) {
    static const char *const lengths[] = {"seq_len", "max_sequence_length", "max_position_embeddings", "n_positions", NULL}, *const vocabularies[] = {
                                                                                                                                 "vocab_size", NULL};
    uint64_t n = integer_of(config, lengths);
    if (o->shape.rank == 0 && n > 0) o->shape = (aq_shape){.rank = 1, .dims = {n < MOST_TOKENS ? n : MOST_TOKENS}};
    if (o->vocabulary == 0) o->vocabulary = (uint32_t)integer_of(config, vocabularies);
    static const char *const masks[] = {"mask_id", "mask_token_id", NULL};
    for (int i = 0; masks[i] && o->mask_token < 0; i++) {
        const json_t *id = json_object_get(config, masks[i]);
        if (json_is_integer(id) && json_integer_value(id) >= 0 && json_integer_value(id) < INT32_MAX) o->mask_token = json_integer_value(id);
    }
}

static void read_schedule(const aq_model *model, aq_synthetic_options *o) {
    static const char *const keys[] = {"num_train_timesteps", NULL};
    char *folder = aq_path_join(aq_model_root(model), "scheduler");
    json_t *scheduler = folder ? load(folder, "scheduler_config.json") : NULL, *metadata = load(aq_model_root(model), "metadata.json");
    if (o->n_timesteps == 0) o->n_timesteps = (uint32_t)integer_of(scheduler, keys);
    if (o->n_timesteps == 0) o->n_timesteps = (uint32_t)integer_of(metadata, keys);
    if (o->n_timesteps == 0) o->n_timesteps = DEFAULT_TIMESTEPS;
    json_decref(scheduler);
    json_decref(metadata);
    aq_free(folder);
}

static aq_status complete(const aq_model *model, aq_synthetic_options *o, aq_error *err) {
    if (o->n_samples == 0) o->n_samples = DEFAULT_SAMPLES;
    if (o->n_samples > LIMIT_SAMPLES) return aq_fail(err, AQ_ERR_USAGE, "%llu samples are more than 1000000", (unsigned long long)o->n_samples);
    if (o->modality == AQ_MODALITY_UNKNOWN) o->modality = aq_model_modality(model);
    if (o->modality == AQ_MODALITY_UNKNOWN) {
        aq_fail(err, AQ_ERR_USAGE, "it cannot be told what the model makes");
        aq_hint(err, "give --modality: text, code, image or audio");
        return AQ_ERR_USAGE;
    }
    bool text = o->modality == AQ_MODALITY_TEXT || o->modality == AQ_MODALITY_CODE;
    json_t *config = load(aq_model_weights_dir(model), "config.json");
    if (text)
        text_shape(config, o);
    else if (o->shape.rank == 0)
        image_shape(config, &o->shape);
    json_decref(config);
    read_schedule(model, o);
    uint64_t count;
    if (o->shape.rank == 0 || !aq_shape_count(&o->shape, &count) || count == 0 || count > UINT64_C(1) << 28) {
        aq_fail(err, AQ_ERR_USAGE, "the model's configuration does not tell the shape of its input");
        aq_hint(err, text ? "give --shape, the number of tokens" : "give --shape, as in 4,64,64");
        return AQ_ERR_USAGE;
    }
    if (text && o->vocabulary < 2) return aq_fail(err, AQ_ERR_USAGE, "the model's configuration does not tell the size of its vocabulary (vocab_size)");
    return AQ_OK;
}

/* ---- rows ---- */

static void put_value(FILE *f, double x) {
    long long v = llround(x * 10000);
    fprintf(f, "%s%lld.%04lld", v < 0 ? "-" : "", (v < 0 ? -v : v) / 10000, (v < 0 ? -v : v) % 10000);
}

static void put_row(FILE *f, const aq_synthetic_options *o, uint64_t index, uint64_t count) {
    uint64_t state = o->seed ^ (index + 1) * UINT64_C(0xD1342543DE82EF95);
    bool text = o->modality == AQ_MODALITY_TEXT || o->modality == AQ_MODALITY_CODE;
    double part = ((double)index + 0.5) / (double)o->n_samples;
    fputs("{\"data\":[", f);
    for (uint64_t i = 0; i < count; i++) {
        if (i) putc(',', f);
        if (!text) {
            put_value(f, draw_normal(&state));
            continue;
        }
        bool has_mask = o->mask_token >= 0, inside = has_mask && o->mask_token < (int64_t)o->vocabulary;
        uint64_t token = (uint64_t)(draw_uniform(&state) * (double)(o->vocabulary - inside));
        if (inside && token >= (uint64_t)o->mask_token) token++;
        if (draw_uniform(&state) < part && has_mask) token = (uint64_t)o->mask_token;
        fprintf(f, "%llu", (unsigned long long)token);
    }
    fprintf(f, "],\"timestep\":%llu,\"shape\":[", (unsigned long long)(part * o->n_timesteps));
    for (uint32_t d = 0; d < o->shape.rank; d++) fprintf(f, "%s%llu", d ? "," : "", (unsigned long long)o->shape.dims[d]);
    fputs("],\"synthetic\":true}\n", f);
}

aq_status aq_dataset_synthesize(const char *path, const aq_model *model, const aq_synthetic_options *options, bool overwrite, aq_synthetic_options *used,
                                aq_error *err) {
    aq_error_clear(err);
    aq_synthetic_options o = *options;
    uint64_t count = 0;
    aq_status status = complete(model, &o, err);
    if (status != AQ_OK) return status;
    aq_shape_count(&o.shape, &count);
    aq_draft draft;
    status = aq_draft_begin(&draft, path, overwrite, err);
    if (status != AQ_OK) return status;
    FILE *f = fopen(draft.temp, "wbe");
    if (!f) status = aq_fail_io(err, errno, path, "cannot create");
    for (uint64_t i = 0; f && !ferror(f) && i < o.n_samples; i++) put_row(f, &o, i, count);
    bool written = f && ferror(f) == 0;
    if (f && fclose(f) != 0) written = false;
    if (f && !written) status = aq_fail_io(err, errno ? errno : ENOSPC, path, "cannot write");
    if (status == AQ_OK) status = aq_draft_commit(&draft, err);
    aq_draft_end(&draft);
    if (used) *used = o;
    return status;
}

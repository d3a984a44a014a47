/* `--to gptq`: a folder in the packed layout of GPTQ (version 1), which transformers, vLLM, gptqmodel and diffusers' auto-round backend load.
 *
 * A layer `L` [out, in] becomes int32 tensors `L.qweight` [in bits / 32, out] (codes of consecutive inputs in a word, lowest bits first), `L.qzeros`
 * [groups, out bits / 32] (zero points of consecutive outputs, minus one), F16 `L.scales` [groups, out] and `L.g_idx` [in]: w = s (q - (qzero + 1)). Zero
 * points are whole: our codes are taken over where they are, as in symmetric ones; else a group gets a whole zero point and the scale that suits it best. The
 * stored minus one makes 0 impossible, and 2^bits is left out: loaders that add the one to packed words would carry it into the neighbour.
 * `quantization_config` in config.json names bits and group size, and the layers that differ or are not packed.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "pipeline/export.h"

enum { MAX_GROUPED = 1 << 20 };

/* Loaders want groups that divide the inputs: ours, or halves of them; two-level ones are split into sub-groups' size. */
static uint64_t group_of(const aq_source_tensor *t) {
    const aq_quant_spec *spec = &t->stored->spec;
    if (spec->axis == 0 || spec->group_size == 0 || spec->group_size >= t->cols) {
        if (spec->params != AQ_PARAMS_TWO_LEVEL && spec->params != AQ_PARAMS_R2Q) return t->cols;
    }
    uint64_t group = spec->params == AQ_PARAMS_TWO_LEVEL || spec->params == AQ_PARAMS_R2Q ? 32 : spec->group_size;
    while (t->cols % group != 0 && group % 2 == 0 && group > 32) group /= 2;
    return group;
}

static void words(export_out *out, uint64_t rows, uint64_t cols) {
    out->dtype = "I32";
    out->shape = (aq_shape){.rank = 2, .dims = {rows, cols}};
    out->size_bytes = rows * cols * 4;
}

static aq_status add_outputs(exporting *x, size_t tensor, const aq_source_tensor *t, uint64_t bits, uint64_t group, aq_error *err) {
    size_t n_base = strlen(t->name) - strlen(".weight");
    uint64_t n_groups = (t->cols + group - 1) / group;
    export_out *out = aq_export_add(x, tensor, t->name, n_base, ".qweight");
    if (out) {
        words(out, t->cols * bits / 32, t->rows);
        out = aq_export_add(x, tensor, t->name, n_base, ".qzeros");
    }
    if (out) {
        words(out, n_groups, t->rows * bits / 32);
        out = aq_export_add(x, tensor, t->name, n_base, ".scales");
    }
    if (out) {
        out->dtype = "F16";
        out->shape = (aq_shape){.rank = 2, .dims = {n_groups, t->rows}};
        out->size_bytes = n_groups * t->rows * 2;
        out = aq_export_add(x, tensor, t->name, n_base, ".g_idx");
    }
    if (out) {
        words(out, 1, t->cols);
        out->shape = (aq_shape){.rank = 1, .dims = {t->cols}};
        out->blob = aq_alloc(out->size_bytes);
        for (uint64_t i = 0; out->blob && i < t->cols; i++) memcpy(out->blob + 4 * i, &(uint32_t){(uint32_t)(i / group)}, 4);
    }
    return out && out->blob ? AQ_OK : aq_fail_memory(err, 4 * t->cols, "the tensor list");
}

static aq_status plan(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err) {
    export_plan *p = &x->plans[tensor];
    uint64_t group = t->stored->quantized ? group_of(t) : 0;
    if (t->stored->quantized) {
        if (t->shape.rank != 2)
            p->refused = "a convolution kernel";
        else if (!aq_text_ends_with(t->name, ".weight"))
            p->refused = "not a layer's weight";
        else if (t->cols % 32 != 0 || t->rows % 32 != 0)
            p->refused = "its sides are no multiples of 32";
        else if (t->cols % group != 0)
            p->refused = "its inputs are no multiple of the group";
        else if (group > MAX_GROUPED)
            p->refused = "its groups are too large";
    }
    if (!t->stored->quantized || p->refused || t->count == 0) return aq_export_plan_kept(x, tensor, t, aq_export_kept_dtype(t, x->dtype), err);
    p->from = EXPORT_RECODED;
    p->whole = true;
    p->group = (uint32_t)group;
    return add_outputs(x, tensor, t, (uint64_t)t->stored->spec.bits, group, err);
}

/* ---- one group ---- */

typedef struct {
    uint16_t scale; /* half */
    uint8_t zero;
} grid;

/* Squared error of codes by rounding on a grid; the sums for the scale that fits them best. */
static double try_grid(const float *x, uint64_t n, float s, float z, float q_max, double *xc, double *cc) {
    double error = 0;
    *xc = *cc = 0;
    for (uint64_t i = 0; i < n; i++) {
        float q = x[i] / s + 12582912.0f - 12582912.0f + z;
        q = q > q_max ? q_max : q < 0 ? 0 : q;
        float c = q - z;
        double e = (double)x[i] - (double)(c * s);
        error += e * e;
        *xc += (double)x[i] * (double)c;
        *cc += (double)c * (double)c;
    }
    return error;
}

#define LARGEST_HALF 65504.0f

/* The half scale and whole zero point (1 to 2^bits - 1) with the smallest error that clipped ranges, and a least-squares scale for each, find. */
static grid search_group(const float *x, uint64_t n, int bits) {
    float lo = 0, hi = 0, q_max = (float)((1 << bits) - 1);
    for (uint64_t i = 0; i < n; i++) lo = x[i] < lo ? x[i] : lo, hi = x[i] > hi ? x[i] : hi;
    grid best = {0x3C00, (uint8_t)(1 << (bits - 1))};
    double least = (double)INFINITY, xc, cc;
    int n_clips = bits == 8 ? 6 : 20;
    float step = bits == 8 ? 0.02f : bits == 4 ? 0.025f : 0.035f;
    if (!(hi > lo)) return best; /* all zero */
    for (int c = 0; c < n_clips; c++) {
        float s = (hi - lo) * (1 - step * (float)c) / q_max, z = -lo * (1 - step * (float)c) / s + 12582912.0f - 12582912.0f;
        for (int shift = -1; shift <= 1; shift++) {
            float zero = z + (float)shift, trial = s;
            zero = zero < 1 ? 1 : zero > q_max ? q_max : zero;
            for (int fit = 0; fit < 3; fit++) {
                uint16_t half = aq_f32_to_f16(fminf(trial, LARGEST_HALF)); /* a larger step is not to be had: values beyond are clipped */
                float rounded = aq_f16_to_f32(half);
                if (!(rounded > 0)) break;
                double error = try_grid(x, n, rounded, zero, q_max, &xc, &cc);
                if (error < least) least = error, best = (grid){half, (uint8_t)zero};
                if (!(cc > 0 && xc > 0)) break;
                trial = (float)(xc / cc);
            }
        }
    }
    return best;
}

/* ---- a layer ---- */

typedef struct {
    const export_slab *slab;
    export_scratch *scratch;
    export_piece *piece;
    uint8_t *qweight, *qzeros, *scales;
    uint64_t group, n_groups;
    int bits;
} packing;

/* Ors `value` into a tensor of 32 bit words, little-endian. */
static void put_bits(uint8_t *words32, uint64_t word, int shift, uint32_t value) {
    words32[4 * word + (uint64_t)shift / 8] |= (uint8_t)(value << shift % 8); /* 2, 4 and 8 bits do not straddle a byte */
}

static void put_group(const packing *p, uint64_t row, uint64_t g, const uint8_t *q, grid found) {
    uint64_t rows = p->slab->t.rows, cols = p->slab->t.cols, per_word = 32 / (uint64_t)p->bits;
    float s = aq_f16_to_f32(found.scale), z = (float)found.zero, *result = p->scratch->result + row * cols + g * p->group;
    for (uint64_t i = 0; i < p->group; i++) {
        uint64_t in = g * p->group + i;
        put_bits(p->qweight, in / per_word * rows + row, (int)(in % per_word) * p->bits, q[i]);
        result[i] = ((float)q[i] - z) * s;
    }
    put_bits(p->qzeros, g * (rows / per_word) + row / per_word, (int)(row % per_word) * p->bits, found.zero - 1u);
    memcpy(p->scales + 2 * (g * rows + row), &found.scale, 2);
    p->piece->n_shifted += found.zero != 1 << (p->bits - 1);
}

/* Our codes of a group, when it has one line with a half scale and a whole zero point that can be stored. */
static bool take_group(const packing *p, const export_row *own, const float *s, const float *z, uint64_t g, uint8_t *q, grid *out) {
    uint64_t first = g * p->group / own->width, last = ((g + 1) * p->group - 1) / own->width;
    uint16_t half = aq_f32_to_f16(s[first]);
    if (first != last || z[first] != floorf(z[first]) || z[first] < 1 || z[first] >= (float)(1 << p->bits) || aq_f16_to_f32(half) != s[first]) return false;
    for (uint64_t i = 0; i < p->group; i++) q[i] = (uint8_t)export_code(own, g * p->group + i);
    *out = (grid){half, (uint8_t)z[first]};
    return true;
}

static void code_group(const float *x, uint64_t n, grid found, int bits, uint8_t *q) {
    float s = aq_f16_to_f32(found.scale), z = (float)found.zero, q_max = (float)((1 << bits) - 1);
    for (uint64_t i = 0; i < n; i++) {
        float c = x[i] / s + 12582912.0f - 12582912.0f + z;
        q[i] = (uint8_t)(c > q_max ? q_max : c < 0 ? 0 : c);
    }
}

/* `own` is NULL where our codes are of no use. */
static bool pack_row(const exporting *x, const packing *p, uint64_t row, const export_row *own, const float *s, const float *z, uint8_t *q) {
    const float *values = p->scratch->values + row * p->slab->t.cols;
    for (uint64_t i = 0; i < p->slab->t.cols; i++) {
        if (isfinite(values[i])) continue;
        aq_fail_at(&p->piece->error, AQ_ERR_FORMAT, x->options->source, p->slab->t.name, "its weights are not all finite");
        return false;
    }
    for (uint64_t g = 0; g < p->n_groups; g++) {
        grid found;
        bool taken = own && take_group(p, own, s, z, g, q, &found);
        if (!taken) {
            found = search_group(values + g * p->group, p->group, p->bits);
            code_group(values + g * p->group, p->group, found, p->bits, q);
        }
        p->piece->n_units++;
        p->piece->n_taken += taken;
        put_group(p, row, g, q, found);
    }
    return true;
}

static bool make(exporting *x, const export_slab *s, export_scratch *t, export_piece *piece) {
    const export_out *outs = &x->outs[s->plan->first_out];
    packing p = {.slab = s, .scratch = t, .piece = piece, .qweight = piece->bytes, .group = s->plan->group, .bits = s->t.stored->spec.bits};
    p.qzeros = p.qweight + outs[0].size_bytes;
    p.scales = p.qzeros + outs[1].size_bytes;
    p.n_groups = s->t.cols / p.group;
    uint64_t n_pairs = s->t.stored->layout.pairs_per_row;
    uint8_t *q = aq_alloc(p.group);
    float *pairs = aq_alloc(2 * n_pairs * sizeof *pairs);
    bool ok = q && pairs, plain = aq_export_has_plain_codes(s->t.stored);
    if (!ok) aq_fail_memory(&piece->error, p.group, "a group of codes");
    for (uint64_t row = 0; ok && row < s->t.rows; row++) {
        export_row own;
        if (plain) ok = aq_export_row_at(x, s->tensor, row, &own, pairs, pairs + n_pairs, &piece->error) == AQ_OK;
        ok = ok && pack_row(x, &p, row, plain ? &own : NULL, pairs, pairs + n_pairs, q);
    }
    aq_free(q);
    aq_free(pairs);
    return ok;
}

/* ---- config.json ---- */

/* The bits and group size that most weights have. */
static const export_plan *commonest(const exporting *x, int *bits) {
    const export_plan *best = NULL;
    uint64_t most = 0;
    for (size_t i = 0; i < x->source.n_tensors; i++) {
        const export_plan *p = &x->plans[i];
        uint64_t count = 0;
        if (p->from != EXPORT_RECODED) continue;
        int mine = aq_store_tensor_at(x->source.store, i)->spec.bits;
        for (size_t j = 0; j < x->source.n_tensors; j++) {
            const aq_store_tensor *t = aq_store_tensor_at(x->source.store, j);
            if (x->plans[j].from == EXPORT_RECODED && x->plans[j].group == p->group && t->spec.bits == mine) count += t->num_params;
        }
        if (count > most) most = count, best = p, *bits = mine;
    }
    return best;
}

/* A layer's name as a regular expression of gptqmodel: "+:^name$" differs, "-:^name$" is not packed. */
static void rule(char *out, size_t size, char sign, const char *layer, size_t n) {
    size_t at = (size_t)snprintf(out, size, "%c:^", sign);
    for (size_t i = 0; i < n && at + 4 < size; i++) {
        if (strchr(".^$*+?{}[]|()\\", layer[i])) out[at++] = '\\';
        out[at++] = layer[i];
    }
    snprintf(out + at, size - at, "$");
}

static int json_group(const export_plan *p, const aq_store_tensor *t) { return p->group == t->cols ? -1 : (int)p->group; }

/* Layers that are linear by their shape and name, and packed otherwise than most, or not at all. */
static aq_status list_exceptions(const exporting *x, const export_plan *common, int bits, json_t *dynamic, json_t *extra, aq_error *err) {
    for (size_t i = 0; i < x->source.n_tensors; i++) {
        const export_plan *p = &x->plans[i];
        const aq_store_tensor *t = aq_store_tensor_at(x->source.store, i);
        char key[1200];
        bool packed = p->from == EXPORT_RECODED;
        if (!aq_text_ends_with(t->name, ".weight") || t->shape.rank != 2 || (packed && p->group == common->group && t->spec.bits == bits)) continue;
        size_t n = strlen(t->name) - strlen(".weight");
        rule(key, sizeof key, packed ? '+' : '-', t->name, n);
        json_t *one = packed ? json_pack("{s:i, s:i}", "bits", t->spec.bits, "group_size", json_group(p, t)) : json_object();
        bool ok = json_object_set_new(dynamic, key, one) == 0;
        snprintf(key, sizeof key, "%.*s", (int)n, t->name);
        one = packed ? json_pack("{s:i, s:i}", "bits", t->spec.bits, "group_size", json_group(p, t)) : json_pack("{s:i, s:s}", "bits", 16, "data_type", "fp");
        if (!ok || json_object_set_new(extra, key, one) != 0) return aq_fail_memory(err, sizeof key, "the configuration");
    }
    return AQ_OK;
}

/* True when every zero point stands in the middle: kernels for symmetric weights may be used then. */
static bool is_symmetric(const exporting *x) { return x->n_shifted == 0; }

static aq_status config(const exporting *x, json_t *root, aq_error *err) {
    int bits = 4;
    const export_plan *common = commonest(x, &bits);
    if (!common) return aq_fail(err, AQ_ERR_FORMAT, "no layer can be packed: nothing has rows and columns that are multiples of 32");
    json_t *dynamic = json_object(), *extra = json_object();
    aq_status status = dynamic && extra ? list_exceptions(x, common, bits, dynamic, extra, err) : aq_fail_memory(err, 1, "the configuration");
    const aq_store_tensor *t = aq_store_tensor_at(x->source.store, (size_t)(common - x->plans));
    bool diffusers = json_is_string(json_object_get(root, "_class_name"));
    json_t *own = json_pack("{s:s, s:i, s:i, s:b, s:b, s:s, s:b, s:b}", "quant_method", diffusers ? "auto-round" : "gptq", "bits", bits, "group_size",
                            json_group(common, t), "sym", is_symmetric(x), "desc_act", 0, "checkpoint_format", "gptq", "lm_head", 0, "static_groups", 0);
    if (diffusers)
        json_object_update_new(own, json_pack("{s:s, s:s, s:O}", "packing_format", "auto_round:auto_gptq", "data_type", "int", "extra_config", extra));
    else
        json_object_update_new(own, json_pack("{s:O}", "dynamic", dynamic));
    json_decref(dynamic);
    json_decref(extra);
    if (json_object_set_new(root, "quantization_config", own) != 0 && status == AQ_OK) status = aq_fail_memory(err, 1, "the configuration");
    return status;
}

const export_target aq_export_gptq = {
    .name = "gptq", .suffix = ".safetensors", .folder = true, .recodes = true, .plan = plan, .make = make, .header = aq_export_st_header, .config = config};

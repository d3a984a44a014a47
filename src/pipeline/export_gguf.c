/* `--to gguf`: one GGUF file with the names and shapes of the source (stable-diffusion.cpp, ComfyUI-GGUF and diffusers look at the names).
 *
 * Quantized matrices become blocks, by take-over of our codes where the grids agree (quant/ggml_codes.c), else coded anew. What has no blocks (convolution
 * kernels, rows that are no multiple of the block, kept tensors) is F16, one-dimensional tensors F32. ggml has four dimensions: of five, as in video models,
 * the two outermost are joined, and the key that ComfyUI-GGUF reads tells the shape.
 */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "pipeline/export.h"

/* Bytes of a name without its NUL: of stock ggml, and of the builds for image models. */
enum { STOCK_NAME = 63, LONGEST_NAME = 127 };

/* Families as ComfyUI-GGUF names them, by tensors that only they have; both names that a row gives must be there. The diffusers naming of a family is told
 * apart: that program loads the original naming only. */
static const struct {
    const char *arch, *name, *also;
    bool diffusers;
} g_families[] = {
    {"flux", "double_blocks.0.img_attn.proj.weight", NULL, false},
    {"flux", "transformer_blocks.0.attn.norm_added_k.weight", NULL, true},
    {"sd3", "joint_blocks.0.x_block.attn.qkv.weight", NULL, false},
    {"sd3", "transformer_blocks.0.attn.add_q_proj.weight", NULL, true},
    {"aura", "double_layers.3.modX.1.weight", NULL, false},
    {"aura", "joint_transformer_blocks.3.ff_context.out_projection.weight", NULL, true},
    {"hidream", "caption_projection.0.linear.weight", "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight", false},
    {"cosmos", "blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight", false},
    {"ltxv", "adaln_single.emb.timestep_embedder.linear_2.weight", "transformer_blocks.27.scale_shift_table", false},
    {"hyvid", "double_blocks.0.img_attn_proj.weight", "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight", false},
    {"wan", "blocks.0.self_attn.norm_q.weight", "head.modulation", false},
    {"sdxl", "down_blocks.0.downsamplers.0.conv.weight", "add_embedding.linear_1.weight", false},
    {"sdxl", "label_emb.0.0.weight", "input_blocks.3.0.op.weight", false},
    {"sd1", "down_blocks.0.downsamplers.0.conv.weight", NULL, false},
    {"sd1", "input_blocks.3.0.op.weight", "output_blocks.8.2.conv.weight", false},
    {"lumina2", "cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight", false},
};

/* True when the model has the tensor, under the prefix of whole checkpoints too. */
static bool has(const exporting *x, const char *name) {
    char prefixed[256];
    snprintf(prefixed, sizeof prefixed, "model.diffusion_model.%s", name);
    return aq_source_find(&x->source, name) >= 0 || aq_source_find(&x->source, prefixed) >= 0;
}

static const char *architecture(const exporting *x, bool *diffusers) {
    for (size_t i = 0; i < sizeof g_families / sizeof *g_families; i++) {
        if (!has(x, g_families[i].name) || (g_families[i].also && !has(x, g_families[i].also))) continue;
        *diffusers = g_families[i].diffusers;
        return g_families[i].arch;
    }
    *diffusers = false;
    return NULL;
}

/* Whether the zero points stand in the middle. A container does not say; the first groups, of which an asymmetric tensor has others, do. */
static bool is_symmetric(const exporting *x, size_t tensor, const aq_store_tensor *t) {
    aq_store_record part;
    aq_quant_layout layout;
    uint64_t row = 0;
    if (t->rows == 0 || t->cols == 0 || t->spec.params != AQ_PARAMS_F16 || aq_export_codes_at(x, tensor, &row, &part, &layout, NULL) != AQ_OK) return false;
    const uint8_t *halves = part.params;
    for (uint64_t i = 0; i < layout.n_groups && i < 64; i++, halves += 4) {
        float s = aq_f16_to_f32((uint16_t)(halves[0] | halves[1] << 8)), o = aq_f16_to_f32((uint16_t)(halves[2] | halves[3] << 8));
        if (o != -(float)(1 << (t->spec.bits - 1)) * s) return false;
    }
    return true;
}

/* The type that loses least of what a tensor's codes are, when none was asked for. */
static uint32_t natural_type(const exporting *x, size_t tensor, const aq_store_tensor *t) {
    if (t->spec.bits == 8) return AQ_GGML_Q8_0;
    if (t->spec.bits == 2) return AQ_GGML_Q2_K;
    if (t->spec.params == AQ_PARAMS_TWO_LEVEL) return AQ_GGML_Q4_K;
    return is_symmetric(x, tensor, t) ? AQ_GGML_Q4_0 : AQ_GGML_Q4_1;
}

/* The blocks for a quantized tensor, NULL when there are none; why it is not the type wanted. */
static const aq_ggml_format *choose(const exporting *x, size_t tensor, const aq_source_tensor *t, const char **refused) {
    const aq_ggml_format *f = x->format ? x->format : aq_ggml_format_of(natural_type(x, tensor, t->stored));
    if (f->type == AQ_GGML_F16) return NULL;
    if (t->shape.rank != 2) {
        *refused = "a convolution kernel has no rows of whole blocks";
        return NULL;
    }
    if (t->cols % f->n_values == 0) return f;
    *refused = f->n_values == 256 ? "its rows are no multiple of 256" : "its rows are no multiple of 32";
    return t->cols % 32 == 0 ? aq_ggml_format_of(AQ_GGML_Q4_1) : NULL;
}

static uint32_t plain_type(aq_dtype dtype) {
    switch (dtype) {
    case AQ_F64: return AQ_GGML_F64;
    case AQ_F32: return AQ_GGML_F32;
    case AQ_F16: return AQ_GGML_F16;
    case AQ_BF16: return AQ_GGML_BF16;
    case AQ_I8:
    case AQ_U8:
    case AQ_BOOL: return AQ_GGML_I8; /* the bytes are the same */
    case AQ_I16:
    case AQ_U16: return AQ_GGML_I16;
    case AQ_I32:
    case AQ_U32: return AQ_GGML_I32;
    case AQ_I64:
    case AQ_U64: return AQ_GGML_I64;
    default: return UINT32_MAX;
    }
}

/* Dimensions as ggml takes them: at least one, at most four. */
static void fit_shape(aq_shape *shape) {
    if (shape->rank == 0) *shape = (aq_shape){.rank = 1, .dims = {1}};
    for (; shape->rank > 4; shape->rank--) {
        uint64_t outer = shape->dims[0];
        for (uint32_t i = 1; i < shape->rank; i++) shape->dims[i - 1] = shape->dims[i];
        shape->dims[0] *= outer; /* the whole count fits 64 bits */
    }
}

static aq_status plan(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err) {
    export_plan *p = &x->plans[tensor];
    aq_status status = AQ_OK;
    if (strlen(t->name) > LONGEST_NAME)
        return aq_fail_at(err, AQ_ERR_FORMAT, aq_source_path(&x->source), t->name, "its name is longer than %d bytes, the most that GGUF loaders take",
                          LONGEST_NAME);
    p->format = t->stored->quantized ? choose(x, tensor, t, &p->refused) : NULL;
    if (p->format) {
        export_out *out = aq_export_add(x, tensor, t->name, strlen(t->name), NULL);
        if (!out) return aq_fail_memory(err, strlen(t->name), "the tensor list");
        p->from = EXPORT_RECODED;
        out->type = p->format->type;
        out->shape = t->shape;
        out->row_bytes = t->cols / p->format->n_values * p->format->n_bytes;
        out->size_bytes = t->rows * out->row_bytes; /* less than the values' own count */
    } else {
        aq_dtype kept = x->dtype != AQ_DTYPE_OTHER ? x->dtype : AQ_F16;
        if (t->is_float && t->shape.rank < 2) kept = AQ_F32;
        status = aq_export_plan_kept(x, tensor, t, aq_export_kept_dtype(t, kept), err);
        if (status != AQ_OK) return status;
        export_out *out = &x->outs[p->first_out];
        out->type = plain_type(p->dtype);
        if (out->type == UINT32_MAX) return aq_fail_at(err, AQ_ERR_FORMAT, NULL, t->name, "GGUF has no elements of type %s", t->dtype);
    }
    fit_shape(&x->outs[p->first_out].shape);
    return status;
}

/* ---- blocks ---- */

static double squared_error(const float *a, const float *b, uint32_t n) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sum;
}

/* Blocks of one row out of our codes, where they fit; the row has been encoded already, and `result` holds what that means. */
static bool take_row(exporting *x, const export_slab *s, uint64_t row, export_scratch *t, export_piece *piece, uint8_t *blocks) {
    const aq_ggml_format *f = s->plan->format;
    aq_store_record part;
    aq_quant_layout layout;
    uint64_t in_part = s->row + row, cols = s->t.cols;
    if (aq_export_codes_at(x, s->tensor, &in_part, &part, &layout, &piece->error) != AQ_OK) return false;
    aq_ggml_codes codes = {&part.spec, &layout, part.data, part.params};
    for (uint64_t col = 0; col < cols; col += f->n_values, blocks += f->n_bytes) {
        uint8_t block[AQ_GGML_MAX_BYTES];
        float v[AQ_GGML_MAX_BLOCK], *result = t->result + row * cols + col;
        const float *wanted = t->values + row * cols + col;
        aq_ggml_fit fit = aq_ggml_take_codes(f, &codes, in_part, col, block);
        if (fit == AQ_GGML_NO_FIT || (fit == AQ_GGML_ROUNDED && s->plan->use_source)) continue;
        f->decode(block, v);
        if (fit == AQ_GGML_ROUNDED && squared_error(wanted, v, f->n_values) > squared_error(wanted, result, f->n_values)) continue;
        memcpy(blocks, block, f->n_bytes);
        memcpy(result, v, f->n_values * sizeof *v);
        piece->n_taken += fit == AQ_GGML_EXACT;
    }
    return true;
}

static bool make(exporting *x, const export_slab *s, export_scratch *t, export_piece *piece) {
    const aq_ggml_format *f = s->plan->format;
    uint64_t per_row = s->t.cols / f->n_values, n = s->n_rows * per_row;
    piece->n_units = n;
    if (!aq_ggml_encode(t->encoder, f, t->values, n, piece->bytes)) {
        aq_fail_at(&piece->error, AQ_ERR_FORMAT, x->options->source, s->t.name, "its weights are not all finite");
        return false;
    }
    aq_ggml_decode(f, piece->bytes, n, t->result);
    for (uint64_t row = 0; row < s->n_rows && aq_export_has_plain_codes(s->t.stored); row++)
        if (!take_row(x, s, row, t, piece, piece->bytes + row * per_row * f->n_bytes)) return false;
    return true;
}

/* ---- header ---- */

/* llama.cpp's number for "mostly this type". */
static uint32_t file_type(const exporting *x) {
    static const struct {
        uint32_t type, number;
    } numbers[] = {{AQ_GGML_Q4_0, 2}, {AQ_GGML_Q4_1, 3}, {AQ_GGML_Q8_0, 7}, {AQ_GGML_Q2_K, 10}, {AQ_GGML_Q4_K, 14}};
    uint64_t most = 0;
    uint32_t best = 1; /* F16 */
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        uint64_t bytes = 0;
        for (size_t o = 0; o < x->n_outs; o++) bytes += x->outs[o].type == numbers[i].type ? x->outs[o].size_bytes : 0;
        if (bytes > most) most = bytes, best = numbers[i].number;
    }
    return best;
}

static void warn_loaders(exporting *x, const char *arch, bool diffusers) {
    size_t n_long = 0;
    const char *first = NULL;
    char name[256];
    for (size_t i = 0; i < x->n_outs; i++)
        if (strlen(x->outs[i].name) > STOCK_NAME && n_long++ == 0) first = x->outs[i].name;
    if (n_long > 0)
        aq_sentences_add(&x->warnings, "%zu names are longer than the %d bytes of stock ggml; builds for image models take %d: %s", n_long, STOCK_NAME,
                         LONGEST_NAME, aq_escape(name, sizeof name, first, strlen(first)));
    if (!arch)
        aq_sentences_add(&x->warnings, "the architecture is none that ComfyUI-GGUF knows; diffusers and readers that go by names load the file");
    else if (diffusers)
        aq_sentences_add(&x->warnings, "the tensors have diffusers' names of %s: diffusers loads the file, ComfyUI-GGUF wants the original names", arch);
}

static aq_status header(exporting *x, size_t first, size_t n, uint8_t **bytes, uint64_t *size, uint64_t *file_size, aq_error *err) {
    bool diffusers;
    (void)first, (void)n; /* one file with all outputs */
    const char *arch = architecture(x, &diffusers);
    aq_gguf_entry *entries = aq_calloc(x->n_outs, sizeof *entries);
    aq_gguf_value *values = aq_calloc(x->n_outs + 3, sizeof *values);
    aq_shape *shapes = aq_calloc(x->n_outs, sizeof *shapes);
    char(*keys)[LONGEST_NAME + 32] = aq_calloc(x->n_outs, sizeof *keys);
    size_t n_values = 0;
    aq_status status = entries && values && shapes && keys ? AQ_OK : aq_fail_memory(err, x->n_outs * sizeof *keys, "a GGUF header");
    if (status == AQ_OK) {
        values[n_values++] = (aq_gguf_value){.key = "general.architecture", .text = arch ? arch : "diffusion"};
        values[n_values++] = (aq_gguf_value){.key = "general.file_type", .number = file_type(x)};
        values[n_values++] = (aq_gguf_value){.key = "general.quantization_version", .number = 2};
        for (size_t i = 0; i < x->source.n_tensors; i++) {
            aq_source_tensor t;
            aq_source_tensor_at(&x->source, i, &t);
            if (t.shape.rank <= 4) continue;
            shapes[i] = t.shape;
            snprintf(keys[i], sizeof keys[i], "comfy.gguf.orig_shape.%s", t.name);
            values[n_values++] = (aq_gguf_value){.key = keys[i], .ints = &shapes[i]};
        }
        for (size_t i = 0; i < x->n_outs; i++)
            entries[i] = (aq_gguf_entry){.name = x->outs[i].name, .type = x->outs[i].type, .shape = x->outs[i].shape, .size_bytes = x->outs[i].size_bytes};
        status = aq_gguf_header_build(bytes, size, file_size, entries, x->n_outs, values, n_values, err);
    }
    for (size_t i = 0; i < x->n_outs && status == AQ_OK; i++) x->outs[i].offset = entries[i].offset;
    if (status == AQ_OK) warn_loaders(x, arch, diffusers);
    aq_free(entries);
    aq_free(values);
    aq_free(shapes);
    aq_free(keys);
    return status;
}

const export_target aq_export_gguf = {.name = "gguf", .suffix = ".gguf", .file = true, .recodes = true, .plan = plan, .make = make, .header = header};

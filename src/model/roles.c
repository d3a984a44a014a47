/* Which tensors are layers to quantize: floating `*.weight` of two or more dimensions, of linear and convolution layers with enough elements.
 *
 * Told from the parts of the name between dots. Embeddings (token, class, position, time) and normalization are kept wherever they stand. First and
 * last projections are kept when they stand outside numbered blocks: `proj_out` is the model's last layer, `blocks.3.proj_out` is a layer like others.
 * The rule knows the naming of diffusers, transformers, the original DiT, Stable Diffusion and Flux code; --include and --exclude overrule it.
 */
#include <ctype.h>
#include <string.h>

#include "model/internal.h"

enum { MIN_ELEMENTS = 4096, MAX_PART = 64 };

/* One part of a name, in lower case, cut at MAX_PART - 1. */
typedef struct name_part {
    char text[MAX_PART];
} name_part;

/* Copies the next part and moves *at behind its dot; false at the end. */
static bool next_part(const char **at, name_part *part) {
    if (!**at) return false;
    size_t n = 0;
    for (; **at && **at != '.'; ++*at)
        if (n + 1 < MAX_PART) part->text[n++] = **at >= 'A' && **at <= 'Z' ? (char)(**at + 32) : **at;
    part->text[n] = 0;
    if (**at == '.') ++*at;
    return true;
}

static bool is_number(const char *text) { return *text && text[strspn(text, "0123456789")] == 0; }

/* `text` is the word, or the word with a number behind it: proj_out, proj_out_1, time2. */
static bool is_word(const char *text, const char *word) {
    size_t n = strlen(word);
    if (*text != *word || strncmp(text, word, n) != 0) return false;
    text += n;
    if (*text == '_') text++;
    return *text == 0 ? text[-1] != '_' : is_number(text);
}

static bool is_any(const char *text, const char *const *words, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (is_word(text, words[i])) return true;
    return false;
}

static bool is_embedding(const char *part) {
    static const char *const words[] = {
        "emb",           "wte",         "wpe",     "tok",          "pos",      "shared", "time", "time_in", "time_mlp", "time_proj", "time_projection",
        "timestep_proj", "guidance_in", "t_block", "adaln_single", "vector_in"};
    size_t n = strlen(part);
    return strstr(part, "embed") || (n > 4 && strcmp(part + n - 4, "_emb") == 0) || is_any(part, words, sizeof words / sizeof *words);
}

static bool is_norm(const char *part) {
    static const char *const words[] = {"ln", "bn", "ln_f", "gn"};
    return strstr(part, "norm") || is_any(part, words, sizeof words / sizeof *words);
}

static bool is_edge(const char *part) {
    static const char *const words[] = {"proj_in",
                                        "proj_out",
                                        "conv_in",
                                        "conv_out",
                                        "head",
                                        "lm_head",
                                        "final_layer",
                                        "final_linear",
                                        "norm_out",
                                        "ff_out",
                                        "out",
                                        "output_layer",
                                        "to_logits",
                                        "img_in",
                                        "txt_in",
                                        "preprocess_conv",
                                        "postprocess_conv",
                                        "caption_projection",
                                        "output_proj",
                                        "global_proj",
                                        "cross_attention_proj",
                                        "input_proj",
                                        "classifier",
                                        "score"};
    return is_any(part, words, sizeof words / sizeof *words);
}

static aq_role role_by_name(const char *name) {
    const char *at = name;
    name_part part, last = {{0}};                                            /* last: before "weight" */
    bool in_block = false, edge = strstr(name, "input_blocks.0.0.") != NULL; /* the first convolution of the original UNet */
    while (next_part(&at, &part) && *at) {
        if (is_embedding(part.text)) return AQ_ROLE_KEEP_EMBED;
        if (!in_block && is_edge(part.text)) edge = true;
        in_block |= is_number(part.text);
        if (!is_number(part.text)) last = part;
    }
    if (edge) return AQ_ROLE_KEEP_EDGE;
    return is_norm(last.text) ? AQ_ROLE_KEEP_NORM : AQ_ROLE_LAYER;
}

aq_role aq_role_of(const aq_tensor_info *t) {
    size_t n = strlen(t->name);
    if (!aq_dtype_is_float(t->dtype)) return AQ_ROLE_KEEP_DTYPE;
    if (t->shape.rank < 2) return AQ_ROLE_KEEP_RANK;
    if (strcmp(t->name, "weight") != 0 && (n < 7 || strcmp(t->name + n - 7, ".weight") != 0)) return AQ_ROLE_KEEP_NAME;
    aq_role role = role_by_name(t->name);
    return role == AQ_ROLE_LAYER && t->count < MIN_ELEMENTS ? AQ_ROLE_KEEP_SMALL : role;
}

void aq_roles_assign(aq_model *model) {
    for (size_t i = 0; i < model->n_tensors; i++)
        if (model->tensors[i].role != AQ_ROLE_SCALE) model->tensors[i].role = aq_role_of(&model->tensors[i]);
}

const char *aq_role_reason(aq_role role) {
    switch (role) {
    case AQ_ROLE_LAYER: return "layer";
    case AQ_ROLE_KEEP_DTYPE: return "not floating";
    case AQ_ROLE_KEEP_RANK: return "fewer than two dimensions";
    case AQ_ROLE_KEEP_SMALL: return "fewer than 4,096 elements";
    case AQ_ROLE_KEEP_NAME: return "not a layer's weight";
    case AQ_ROLE_KEEP_EMBED: return "token, class, position or time embedding";
    case AQ_ROLE_KEEP_NORM: return "normalization";
    case AQ_ROLE_KEEP_EDGE: return "first or last projection";
    case AQ_ROLE_SCALE: return "scale of fp8 weights, applied to them";
    }
    return "unknown";
}

/* The block formats of GGML, as GGUF files store them: sizes, decoding, encoding, and taking over our own codes.
 *
 * A tensor is a run of blocks along its innermost dimension; a block holds a few shared numbers and one code a weight. Decoding defines the formats: F32
 * arithmetic in the order of the reference (`gguf` package), so that values agree with it to the last bit. Little-endian throughout.
 * Source: the GGUF specification and the layouts documented with the reference readers. */
#ifndef AQ_QUANT_GGML_H
#define AQ_QUANT_GGML_H

#include <arrowquant/quant.h>

/* Type numbers as files store them. */
enum {
    AQ_GGML_F32 = 0,
    AQ_GGML_F16 = 1,
    AQ_GGML_Q4_0 = 2,
    AQ_GGML_Q4_1 = 3,
    AQ_GGML_Q5_0 = 6,
    AQ_GGML_Q5_1 = 7,
    AQ_GGML_Q8_0 = 8,
    AQ_GGML_Q2_K = 10,
    AQ_GGML_Q3_K = 11,
    AQ_GGML_Q4_K = 12,
    AQ_GGML_Q5_K = 13,
    AQ_GGML_Q6_K = 14,
    AQ_GGML_I8 = 24,
    AQ_GGML_I16 = 25,
    AQ_GGML_I32 = 26,
    AQ_GGML_I64 = 27,
    AQ_GGML_F64 = 28,
    AQ_GGML_BF16 = 30
};

enum { AQ_GGML_MAX_BLOCK = 256, AQ_GGML_MAX_BYTES = 210 };

typedef struct aq_ggml_format {
    uint32_t type;
    const char *name;                                 /* "Q4_K"; NULL in the table's gaps */
    uint32_t n_values;                                /* of a block; 1 for plain elements */
    uint32_t n_bytes;                                 /* of a block */
    aq_dtype dtype;                                   /* plain elements; AQ_DTYPE_OTHER for blocks */
    void (*decode)(const uint8_t *block, float *out); /* NULL: plain, or a type that is known by name only */
} aq_ggml_format;

/* NULL for a number that no type has. A known type that cannot be read here has neither decode nor dtype. */
const aq_ggml_format *aq_ggml_format_of(uint32_t type);
/* By name, in any case: "q4_k". NULL when there is none. */
const aq_ggml_format *aq_ggml_format_named(const char *name);
static inline bool aq_ggml_is_block(const aq_ggml_format *f) { return f->decode != NULL; }

void aq_ggml_decode(const aq_ggml_format *format, const uint8_t *blocks, uint64_t n_blocks, float *out);

/* ---- encoding: Q8_0, Q4_0, Q4_1, Q4_K, Q2_K ---- */

typedef struct aq_ggml_encoder aq_ggml_encoder;
bool aq_ggml_can_encode(const aq_ggml_format *format);
/* Scratch of one thread. NULL: no memory. */
aq_ggml_encoder *aq_ggml_encoder_create(void);
void aq_ggml_encoder_free(aq_ggml_encoder *encoder);
/* Encodes n_blocks of values with a small squared error: the searches of this library (quant_internal.h) on the format's grid. Every value must be finite:
 * false otherwise. The same bytes on every instruction set. */
bool aq_ggml_encode(aq_ggml_encoder *encoder, const aq_ggml_format *format, const float *values, uint64_t n_blocks, uint8_t *blocks);

/* ---- our codes as blocks ---- */

typedef struct aq_ggml_codes {
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const uint8_t *codes;
    const void *params;
} aq_ggml_codes;

typedef enum aq_ggml_fit {
    AQ_GGML_NO_FIT,  /* the block's weights do not share the pairs that the format wants */
    AQ_GGML_ROUNDED, /* the same codes, with scale or offset rounded to the format's halves */
    AQ_GGML_EXACT    /* the same codes and the same line w = s q + o: nothing is lost */
} aq_ggml_fit;
/* The block of `format` that holds the codes of row `row` from column `col` on (col + n_values <= cols). */
aq_ggml_fit aq_ggml_take_codes(const aq_ggml_format *format, const aq_ggml_codes *codes, uint64_t row, uint64_t col, uint8_t *block);

#endif

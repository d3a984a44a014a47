/* Writing GGML blocks from their parts: shared by the encoder and by what takes over our codes. */
#ifndef AQ_QUANT_GGML_INTERNAL_H
#define AQ_QUANT_GGML_INTERNAL_H

#include "quant/ggml.h"

/* What a block is made of. Lines of 32 weights: one d (half) and m (half, Q4_1 only). Blocks of 256: outer d and dmin, and k and min per sub-block. */
typedef struct aq_ggml_parts {
    uint16_t d, m; /* halves; of the blocks of 256, m is dmin */
    uint8_t k[16], min[16];
    uint8_t q[AQ_GGML_MAX_BLOCK]; /* unsigned codes: Q8_0 stores q - 128 */
} aq_ggml_parts;

/* How a format that can be encoded looks as a spec of ours: bits, symmetric, and for 256 weights two-level. */
aq_quant_spec aq_ggml_spec(const aq_ggml_format *format);
void aq_ggml_pack(const aq_ggml_format *format, const aq_ggml_parts *parts, uint8_t *block);

#endif

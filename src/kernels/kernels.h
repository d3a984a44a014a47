/* Kernels: the inner loops, one table of function pointers per instruction set.
 *
 * scalar.c defines what each kernel computes; template.h holds the vector form, which avx2.c, avx512.c and neon.c include and compile with
 * their own flags. All give the same bits: elementwise operations are single IEEE operations (no contraction into fused multiply-add;
 * matrix products ask for it by name), and where a kernel sums, the order is part of its contract. Arrays need no alignment. Inputs are finite unless a kernel
 * says otherwise.
 */
#ifndef AQ_KERNELS_KERNELS_H
#define AQ_KERNELS_KERNELS_H

#include <arrowquant/base.h>

/* Sums of an approximation v of w. Element i is added to lane i % 16; lanes are folded 16 -> 8 -> 4 -> 2 -> 1, lane j taking lane j + half. */
typedef struct aq_error_sums {
    double dot, w_sq, v_sq, err_sq, err_max;
} aq_error_sums;

/* The search works on 16 lanes: a lane is a group (its values transposed: step i of lane j at x[16 i + j]) or a sixteenth of one large group
 * (its values as they lie). Sums run over the steps in rising order. */
enum { AQ_LANES = 16 };

/* 16 lanes of values, with their weights in the squared error (h, >= 0; NULL: all 1; 0 for padding). */
typedef struct aq_block {
    const float *x, *h;
    size_t steps;
} aq_block;

/* A line w = s q + o per lane, and the sum of h (x - w)^2 that it leaves. */
typedef struct aq_lines {
    float s[AQ_LANES], o[AQ_LANES], error[AQ_LANES];
} aq_lines;

/* What one pass learns about the codes q = clamp(rint((x - o) * (1 / s))) and their residuals r = (x - o) - q s: per lane, in F32, the sums of
 * h q, (h q) q, h r, (h r) q, (h r) r. They suffice for the least-squares line of these codes. */
typedef struct aq_fit_sums {
    float q[AQ_LANES], qq[AQ_LANES], r[AQ_LANES], rq[AQ_LANES], rr[AQ_LANES];
} aq_fit_sums;

/* Small integers per lane on the grid of an outer pair (two-level parameters): s = outer_s k, o = outer_o m. */
typedef struct aq_grid {
    float outer_s[AQ_LANES], outer_o[AQ_LANES];
    float k[AQ_LANES], m[AQ_LANES], error[AQ_LANES];
} aq_grid;

typedef struct aq_grid_limits {
    float k_top, m_low, m_top;
} aq_grid_limits;

/* The reciprocal of a scale below this could overflow. */
#define AQ_TINY_SCALE 0x1p-120f

/* What of a tile counts: its first rows and columns, of row i the columns from `diagonal` + i on. */
typedef struct aq_gemm_edge {
    size_t rows, cols;
    ptrdiff_t diagonal; /* -rows or less: all */
    bool subtract;
} aq_gemm_edge;

/* The parts of a matrix product (gemm.c puts them together): elements of `element` bytes, tiles of rows x cols. */
typedef struct aq_gemm_kernels {
    size_t element, rows, cols;
    /* out[l * rows + i] = in[i * stride + l * step] for l < k and i < width, 0 for width <= i < rows; `cols` in place of rows for the other. */
    void (*pack_rows)(void *out, const void *in, uint64_t stride, uint64_t step, size_t width, size_t k);
    void (*pack_cols)(void *out, const void *in, uint64_t stride, uint64_t step, size_t width, size_t k);
    /* c[i * ldc + j] += (or -=) the sum of a[l * rows + i] * b[l * cols + j], a chain of fused multiply-adds from 0 over rising l. */
    void (*tile)(size_t k, const void *a, const void *b, void *c, uint64_t ldc, const aq_gemm_edge *edge);
    /* y[i] = fma(-f[l], x[l * stride + i], y[i]) for i < n, over rising l < count. */
    void (*subtract_rows)(const void *f, size_t count, const void *x, size_t stride, size_t n, void *y);
} aq_gemm_kernels;

/* Rows of codes (of `outputs` outputs), seen as words of 32 bits, each with 32 / bits codes; a block is 16 words. w = s q + o, where word d of the first row
 * takes s[d >> shift], shift <= 4, and its pair p of n_pairs has o[p]; those of the next row stand `lines` floats further on. s and o can be read 16 elements
 * past their last. */
typedef struct aq_code_rows {
    const uint8_t *codes;
    size_t outputs, bytes, readable; /* of a row, which follow each other; from the first one's start to the end of the memory that holds them */
    int bits;
    const float *s, *o;
    unsigned shift;
    size_t n_pairs, lines;
} aq_code_rows;

/* Codes of `width` rows, `depth` steps (inputs) of each. */
typedef struct aq_code_panel {
    const uint8_t *codes; /* step 0 of the first row */
    uint64_t row_bytes;   /* from row to row */
    size_t bytes;         /* that may be read of each row from `codes` on */
    size_t width, depth;
    int bits;
    const float *factors; /* NULL; or words of a factor below and above, for each `factor_words` words of codes one line of all columns */
    size_t factor_words;
} aq_code_panel;

/* ---- products of integers ----
 *
 * Inputs of 16 bits times codes. Two integers of 16 bits make a word; arrays of words are arrays of float of which only the bits count. The 32 / bits codes of
 * a word of codes become words of which number t holds code t below and code t + 16 / bits above: a shift and a mask. Inputs are paired in the same way.
 * Inputs of 8 bits may make words of four (`bytes`), the signed ones of inputs times the unsigned ones of codes: t, t + 8 / bits, t + 16 / bits, t + 24 / bits.
 */

/* Inputs of a block. Sums over a segment fit 32 bits: of a block's inputs, 32767 or less in size, times codes of 8 bits; times codes of 2 bits and factors of
 * two-level parameters up to 16; of AQ_FACTOR_SPAN inputs times codes of 4 bits and factors up to 64. */
enum { AQ_WORD_BLOCK = 256, AQ_FACTOR_SPAN = 64, AQ_INPUT_TOP = 32767 };
_Static_assert((int64_t)AQ_INPUT_TOP * 255 * AQ_WORD_BLOCK <= INT32_MAX && (int64_t)AQ_INPUT_TOP * 3 * 16 * AQ_WORD_BLOCK <= INT32_MAX &&
                   (int64_t)AQ_INPUT_TOP * 15 * 64 * AQ_FACTOR_SPAN <= INT32_MAX,
               "sums of a segment fit 32 bits");

/* How the words of a block fall into segments of one scale, or of one offset: words [0, first), then `width` each. */
typedef struct aq_segments {
    size_t words, first, width;
} aq_segments;

/* A block of some rows of x and of some outputs, laid out for a tile. */
typedef struct aq_word_block {
    aq_segments scales;
    size_t n_offsets;
    const float *x, *x_scales, *x_sums; /* [words][rows], [rows], [n_offsets][rows] */
    const float *w, *s, *o;             /* [words][cols], lines w = s q + o: [segments of scales][cols], [n_offsets][cols] */
} aq_word_block;

typedef struct aq_word_kernels {
    size_t rows, cols; /* of a tile */
    size_t per;        /* integers in a word: 2, or 4 */
    /* Steps [0, depth), depth <= AQ_WORD_BLOCK, of `rows` rows of finite inputs (NULL: zeros) as integers X = rint(x / scale), 0 behind the last. The scale of
     * a row is the power of two, 2^-126 or more, with which the largest |X| lies between 2^14 and 32767. sums: those of X over each segment. */
    void (*pack_inputs)(const float *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *scales, float *sums);
    /* The same of inputs that are codes of 8 bits: X = x - 128. */
    void (*pack_codes)(const uint8_t *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *sums);
    /* Words of the codes of a panel, times their factors where it has any (`per` 2 only). Columns from its width on are not defined. */
    void (*unpack_codes)(const aq_code_panel *panel, float *words);
    /* Rows [0, height) and outputs [0, width) of y = from + the product, where all of a tile can be read of `from` (stride 0: the same line for each row). With
     * I the exact sum of X q over a segment, p = 0; p = fma(I, s, p) over rising segments, I rounded to float; then p = fma(o, x_sums, p) over the offsets; y =
     * fma(p, scale, from). */
    void (*tile)(const aq_word_block *block, const float *from, uint64_t from_stride, size_t height, size_t width, float *y, uint64_t y_stride);
} aq_word_kernels;

typedef struct aq_kernels {
    const char *name;

    /* Bulk conversion, as base/half.h defines it. NaN allowed. */
    void (*f16_to_f32)(const uint16_t *in, float *out, size_t n);
    void (*f32_to_f16)(const float *in, uint16_t *out, size_t n);
    void (*bf16_to_f32)(const uint16_t *in, float *out, size_t n);
    void (*f32_to_bf16)(const float *in, uint16_t *out, size_t n);

    /* Column statistics of x [rows, n] (`stride` floats from row to row): per column, row after row, x added to sum and x * x to sum_sq in double, lo and hi
     * lowered and raised. NaN and infinity show in sum_sq. */
    void (*column_stats)(const float *x, size_t rows, size_t stride, size_t n, double *sum, double *sum_sq, float *lo, float *hi);

    /* Index of the first NaN or infinity, n when there is none. */
    size_t (*find_nonfinite)(const float *x, size_t n);
    /* Smallest and largest of n >= 1 values, zeros as +0; false (and lo, hi undefined) when one is NaN or infinite. */
    bool (*range)(const float *x, size_t n, float *lo, float *hi);
    /* The same of n_groups <= 16 groups of n values that follow each other; false when one of all values is NaN or infinite. */
    bool (*ranges)(const float *x, size_t n, size_t n_groups, float *lo, float *hi);

    /* codes[i] = clamp(rint(x[i] * (1 / s) + z), 0, q_max), one byte each; half to even; x[i] / s when s < AQ_TINY_SCALE. s > 0. */
    void (*quantize)(const float *x, size_t n, float s, float z, int q_max, uint8_t *codes);
    /* codes[i] = clamp(rint(x[i] / s + z), 0, 255), NaN as 0: how inputs of layers are coded (time.h). */
    void (*quantize_inputs)(const float *x, size_t n, float s, float z, uint8_t *codes);
    /* The same codes as quantize, q_max 3 and 15, packed as pack2 and pack4 do. */
    void (*quantize2)(const float *x, size_t n, float s, float z, uint8_t *packed);
    void (*quantize4)(const float *x, size_t n, float s, float z, uint8_t *packed);
    /* The same codes of n <= 16 groups of `size` values that follow each other, group j with s[j] and z[j], size * bits whole bytes, x / s below 2^30; and
     * `ranges` of the n_next <= 16 groups from `next` on, which so come from memory in the meantime: false when one of these is not finite. */
    bool (*quantize_groups)(const float *x, size_t size, size_t n, const float *s, const float *z, int bits, uint8_t *packed, const float *next, size_t n_next,
                            float *lo, float *hi);
    /* out[i] = ((float)codes[i] - z) * s */
    void (*dequantize)(const uint8_t *codes, size_t n, float s, float z, float *out);
    /* One code a byte <-> 8 / bits codes a byte, little-endian; unused bits of the last byte are 0. */
    void (*pack2)(const uint8_t *codes, size_t n, uint8_t *packed);
    void (*pack4)(const uint8_t *codes, size_t n, uint8_t *packed);
    void (*unpack2)(const uint8_t *packed, size_t n, uint8_t *codes);
    void (*unpack4)(const uint8_t *packed, size_t n, uint8_t *codes);

    /* Min-max pairs (rtn.c) of 16 finite ranges; s[i] = z[i] = 0 for those that are left to the caller: equal ends, scales near the ends of the range of F32.
     * The f16 form stores halves of scale and offset at slots[2 i] and gives the pairs that come back; the caller checks that they fit. */
    void (*rtn_f32)(const float *lo, const float *hi, int q_max, float *s, float *z);
    void (*rtn_f16)(const float *lo, const float *hi, int q_max, uint16_t *slots, float *s, float *z);

    /* Sums over n elements, in the order of aq_error_sums. */
    void (*error_sums)(const float *w, const float *v, size_t n, aq_error_sums *out);

    /* ---- search: one pass over a block each ---- */

    /* x[16 i + j] = rows[j][i] for i < n. */
    void (*transpose)(const float *const rows[AQ_LANES], size_t n, float *x);
    /* Smallest and largest value of each lane over the steps >= 1, zeros as +0; false (and lo, hi undefined) when one is NaN or infinite. */
    bool (*lane_range)(const float *x, size_t steps, float *lo, float *hi);
    /* fit_sums, then fit_lines, of the lines s = clip * from->s, o = from->o + shift * s. `out` (may be NULL) takes the fitted lines. */
    void (*fit)(const aq_block *block, int q_max, const float *weight, float middle, const aq_lines *from, float clip, float shift, aq_lines *out,
                aq_lines *best);
    void (*fit_sums)(const aq_block *block, int q_max, const aq_lines *lines, aq_fit_sums *out);
    /* The least-squares line of the codes that `sums` describes replaces `lines` (same s and o that made the sums), with its error; `weight` is the
     * sum of h per lane. middle >= 0: o stays -middle s. Lanes without such a line (equal codes, s <= 0) keep theirs and get error infinity.
     * `best` (may be NULL) takes the lines with a smaller error than its own. */
    void (*fit_lines)(const aq_fit_sums *sums, const float *weight, float middle, aq_lines *lines, aq_lines *best);
    /* Tries three moves of `from`, k + dk[i] and m + dm[i] within the limits, in order, and keeps in `best` what has a smaller error. */
    void (*grid_try)(const aq_block *block, int q_max, const aq_grid *from, const float dk[3], const float dm[3], const aq_grid_limits *limits, aq_grid *best);
    /* error[j] = sum of h (x - v)^2 in double, v as `quantize` and `dequantize` give it for the lane's s >= AQ_TINY_SCALE and z. */
    void (*pair_error)(const aq_block *block, int q_max, const float *s, const float *z, double *error);

    /* ---- matrix products ---- */
    const aq_gemm_kernels *gemm_f32, *gemm_f64;
    /* Lines w = s q + o of n pairs of finite halves s, o, which need no alignment. */
    void (*half_lines)(const uint8_t *stored, size_t n, float *s, float *o);
    /* Lines of n full records of two-level parameters (params.c), 8 each at 4 bits and 16 at 2: s = S k, o = O m, S and O finite. */
    void (*two_level)(const uint8_t *records, int bits, size_t n, float *s, float *o);
    /* out[r * out_stride + i] = sum of w x[r] over row i of the codes, for n_rows <= 4 rows of x. x[r * x_stride + (block * per + t) * 16 + j] is the input of
     * code t of word j (per = 32 / bits), 0 behind the last; sums[r * sums_stride + p] is the sum of those of pair p, 0 from n_pairs up to a multiple of 16.
     * Lane j is the sum of o * sums over the pairs j, j + 16, ..., then of s * (sum of q x over rising t) over the blocks; all fused multiply-adds. Lanes are
     * folded as in aq_error_sums. */
    void (*dot_codes)(const aq_code_rows *codes, const float *x, size_t x_stride, const float *sums, size_t sums_stride, size_t n_rows, float *out,
                      size_t out_stride);

    const aq_word_kernels *words; /* for inputs of 16 bits */
    const aq_word_kernels *bytes; /* for those of 8: the same, or with words of four; pack_inputs NULL then */

    /* ---- solvers ---- */

    /* y[i * stride + j] += e[k * 16 + j] * u[k * u_stride + i] for i < n and the 16 lanes j, over rising k < count; one multiplication, one addition each. */
    void (*spread)(const float *e, size_t count, const float *u, size_t u_stride, size_t n, float *y, size_t stride);
} aq_kernels;

/* avx512_vnni: avx512 with the instruction for products of 16-bit integers. */
extern const aq_kernels aq_kernels_scalar, aq_kernels_avx2, aq_kernels_avx512, aq_kernels_avx512_vnni, aq_kernels_neon;

/* The kernels in use: the best that the CPU has, or what ARROWQUANT_ISA (scalar, avx2, avx512, neon) names; an unusable name counts as not set here. */
const aq_kernels *aq_kernels_get(void);
/* The table of an instruction set: "scalar", "avx2", "avx512", "neon". NULL when the name is unknown or this CPU lacks it. "avx512" is avx512_vnni where the
 * CPU has that; tests reach the other as "avx512-bw". */
const aq_kernels *aq_kernels_find(const char *isa);
/* Selects for the whole process; NULL or "": what ARROWQUANT_ISA says, else the best. AQ_ERR_USAGE when unknown or not on this CPU. A program calls it at its
 * start. */
AQ_API aq_status aq_kernels_select(const char *isa, aq_error *err);

#endif

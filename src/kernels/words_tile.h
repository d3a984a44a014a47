/* The tile of a product of integers (aq_word_kernels), written once for every instruction set. A file defines, then includes this:
 *   SUM                       a register of sums on their way, at first all zero
 *   ADD_PRODUCTS(sum, a, b)   sum += the two products of each word of a and b
 *   SUM_OF(sum)               the register of 32-bit sums
 *   PER, PACK_INPUTS          integers in a word; how inputs of 16 bits are packed, or NULL
 *   NAME(x)                   x_words, or another name where an instruction set has two
 * WORD_ROWS * WORD_VECTORS sums stay in registers. Integer sums are exact, so that their order is free; what follows them is the contract of kernels.h.
 */
static inline __attribute__((always_inline)) void NAME(sums_of)(size_t height, size_t n, const float *x, const float *w, vi *out) {
    SUM sum[WORD_ROWS][WORD_VECTORS];
    for (size_t i = 0; i < height; i++)
        for (size_t v = 0; v < WORD_VECTORS; v++) sum[i][v] = (SUM){0};
    size_t l = 0;
    if (height == 1) { /* the sums of one row would wait for each other */
        for (size_t u = 1; u < CHAINS; u++)
            for (size_t v = 0; v < WORD_VECTORS; v++) sum[u][v] = (SUM){0};
        for (; l + CHAINS <= n; l += CHAINS)
            for (size_t u = 0; u < CHAINS; u++) {
                int32_t word;
                memcpy(&word, x + (l + u) * WORD_ROWS, sizeof word);
                vi left = word - (vi){0};
                for (size_t v = 0; v < WORD_VECTORS; v++) {
                    vi right;
                    memcpy(&right, w + (l + u) * WORD_COLS + v * W, sizeof right);
                    ADD_PRODUCTS(sum[u][v], left, right);
                }
            }
    }
    for (; l < n; l++) {
        vi right[WORD_VECTORS];
        for (size_t v = 0; v < WORD_VECTORS; v++) memcpy(&right[v], w + l * WORD_COLS + v * W, sizeof(vi));
        for (size_t i = 0; i < height; i++) {
            int32_t word;
            memcpy(&word, x + l * WORD_ROWS + i, sizeof word);
            vi left = word - (vi){0};
            for (size_t v = 0; v < WORD_VECTORS; v++) ADD_PRODUCTS(sum[i][v], left, right[v]);
        }
    }
    for (size_t i = 0; i < height; i++)
        for (size_t v = 0; v < WORD_VECTORS; v++) {
            vi total = SUM_OF(sum[i][v]);
            for (size_t u = 1; height == 1 && u < CHAINS; u++) total += SUM_OF(sum[u][v]);
            out[i * WORD_VECTORS + v] = total;
        }
}

static inline __attribute__((always_inline)) void NAME(tile_of)(size_t rows, const aq_word_block *b, const float *from, uint64_t from_stride, size_t height,
                                                                size_t width, float *y, uint64_t y_stride) {
    vf part[WORD_ROWS * WORD_VECTORS], line[WORD_VECTORS];
    size_t segment = 0;
    for (size_t k = 0; k < rows * WORD_VECTORS; k++) part[k] = (vf){0};
    for (size_t at = 0, end = b->scales.first; at < b->scales.words; at = end, end += b->scales.width, segment++) {
        vi sums[WORD_ROWS * WORD_VECTORS];
        if (end > b->scales.words) end = b->scales.words;
        NAME(sums_of)(rows, end - at, b->x + at * WORD_ROWS, b->w + at * WORD_COLS, sums);
        for (size_t v = 0; v < WORD_VECTORS; v++) line[v] = v_load(b->s + segment * WORD_COLS + v * W);
        for (size_t i = 0; i < rows; i++)
            for (size_t v = 0; v < WORD_VECTORS; v++) {
                size_t k = i * WORD_VECTORS + v;
                part[k] = v_fma(__builtin_convertvector(sums[k], vf), line[v], part[k]);
            }
    }
    vf total[WORD_ROWS][WORD_VECTORS];
    for (size_t i = 0; i < rows; i++)
        for (size_t v = 0; v < WORD_VECTORS; v++) total[i][v] = part[i * WORD_VECTORS + v];
    for (size_t k = 0; k < b->n_offsets; k++) {
        for (size_t v = 0; v < WORD_VECTORS; v++) line[v] = v_load(b->o + k * WORD_COLS + v * W);
        for (size_t i = 0; i < rows; i++)
            for (size_t v = 0; v < WORD_VECTORS; v++) total[i][v] = v_fma(line[v], v_set(b->x_sums[k * WORD_ROWS + i]), total[i][v]);
    }
    float edge[WORD_ROWS * WORD_COLS];
    bool whole = height == rows && width == WORD_COLS;
    for (size_t i = 0; i < rows; i++)
        for (size_t v = 0; v < WORD_VECTORS; v++) {
            vf sum = v_fma(total[i][v], v_set(b->x_scales[i]), v_load(from + i * from_stride + v * W));
            /* cppcheck-suppress legacyUninitvar ; it is written here */
            v_store((whole ? y + i * y_stride : edge + i * WORD_COLS) + v * W, sum);
        }
    for (size_t i = 0; !whole && i < height; i++) memcpy(y + i * y_stride, edge + i * WORD_COLS, width * sizeof *y);
}

static void NAME(tile)(const aq_word_block *b, const float *from, uint64_t from_stride, size_t height, size_t width, float *y, uint64_t y_stride) {
    if (height > 8 && WORD_ROWS > 8)
        NAME(tile_of)(WORD_ROWS, b, from, from_stride, height, width, y, y_stride);
    else if (height > 4 && WORD_ROWS > 4)
        NAME(tile_of)(WORD_ROWS < 8 ? WORD_ROWS : 8, b, from, from_stride, height, width, y, y_stride);
    else if (height > 1)
        NAME(tile_of)(4, b, from, from_stride, height, width, y, y_stride);
    else
        NAME(tile_of)(1, b, from, from_stride, height, width, y, y_stride);
}

static const aq_word_kernels NAME(kernels) = {
    WORD_ROWS, WORD_COLS, PER, PACK_INPUTS, PER == 4 ? pack_bytes : pack_codes, PER == 4 ? unpack_bytes : unpack_codes, NAME(tile)};

#undef SUM
#undef ADD_PRODUCTS
#undef SUM_OF
#undef PER
#undef PACK_INPUTS
#undef NAME

/* The 16 bytes that `code_bytes` makes of 16 codes, as they are and packed: shared by the x86 instruction sets. */
static inline void codes_store(uint8_t *p, const vf *q) { _mm_storeu_si128((__m128i *)p, code_bytes(q)); }

#ifndef HAS_CODES_PACK4
static inline void codes_pack4(uint8_t *p, const vf *q) {
    __m128i words = _mm_maddubs_epi16(code_bytes(q), _mm_set1_epi16(0x1001)); /* first + 16 second */
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
#endif

static inline void codes_pack2(uint8_t *p, const vf *q) {
    __m128i words = _mm_maddubs_epi16(code_bytes(q), _mm_set1_epi16(0x0401)), fours = _mm_madd_epi16(words, _mm_set1_epi32(0x00100001));
    words = _mm_packs_epi32(fours, fours);
    int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(p, &bytes, 4);
}

/* Building the JSON reports: numbers that may be unknown, text that may not be UTF-8, numbers in text without the host's locale. */
#ifndef AQ_PIPELINE_REPORT_H
#define AQ_PIPELINE_REPORT_H

#include <arrowquant/calibration.h>
#include <arrowquant/model.h>
#include <arrowquant/quant.h>
#include <jansson.h>

/* null for NaN and infinity. New reference; NULL: no memory (json_pack then fails as a whole). */
json_t *aq_report_real(double value);
/* The text, escaped where it is not printable UTF-8; null for NULL. */
json_t *aq_report_text(const char *text);
json_t *aq_report_shape(const aq_shape *shape);
/* Where statistics come from, nothing of the path they were read from; null for NULL. */
json_t *aq_report_calibration(const aq_calib *calib);
/* The program's text as a JSON value; an empty object when it is no JSON. */
json_t *aq_report_parsed(const char *json_text);
/* Text of a finished report; takes the reference. AQ_ERR_MEMORY when `report` is NULL. `out` may be NULL. */
aq_status aq_report_finish(json_t *report, char **out, aq_error *err);

/* `value` with `decimals` (at most 15) digits after the point, always a point. Returns out. */
const char *aq_text_fixed(char out[32], double value, int decimals);
/* A value that is below a floor: the floor with the digits it needs, the value with six or as many as tell it from the floor. Both within 0 to 1. */
void aq_text_below(char value_text[32], char floor_text[32], double value, double floor);
/* "18.9 MB" (10^6). Returns out. */
const char *aq_text_bytes(char out[32], uint64_t size_bytes);
/* "[3072, 3072]". Returns out. */
const char *aq_text_shape(char out[192], const aq_shape *shape);

/* A growing list of sentences. */
typedef struct aq_sentences {
    char **items;
    size_t n_items, capacity;
    bool failed; /* out of memory: one is missing */
} aq_sentences;
void aq_sentences_add(aq_sentences *list, const char *format, ...) __attribute__((format(printf, 2, 3)));
void aq_sentences_free(aq_sentences *list);
json_t *aq_sentences_json(const aq_sentences *list);

#endif

/* Test helper for the jobs: configurations in a line, runs with their report as JSON, folders compared byte by byte, a small model of every kind of tensor. */
#ifndef AQ_TEST_PIPELINE_MODEL_H
#define AQ_TEST_PIPELINE_MODEL_H

#include <arrowquant/pipeline.h>
#include <jansson.h>

#define DIT AQ_SOURCE_DIR "/examples/dit-fashion"

/* clang-format off */
#define SHAPE2(r, c) { 2, { r, c } }
#define SHAPE1(n) { 1, { n } }
/* clang-format on */

typedef struct {
    aq_status status;
    aq_error err;
    json_t *report;
} result;

int pipeline_setup(void **state);
int pipeline_teardown(void **state);
/* "bit_width=2 method=rtn …" onto the defaults. */
aq_config *config_of(const char *settings);
result quantize_with(const char *model, const char *out, const char *settings, const aq_quantize_options *options, const aq_job_hooks *hooks);
json_t *quantize(const char *model, const char *out, const char *settings);
double number(const json_t *object, const char *a, const char *b);
/* The entry of a report's list with this name, or NULL. */
json_t *named(const json_t *report, const char *list, const char *name);
/* SHA-256 over the names and contents of all files of a folder (one level of folders below it). */
void digest_folder(const char *path, const char *prefix, char **text);
void assert_same_folder(const char *a, const char *b);
/* Something of a run lies beside its target. */
bool has_state(const char *out);
void assert_nothing_left(const char *out);
/* A model of every element type, odd sizes, a convolution, kept tensors, integers. 5 layers, 4 kept. */
const char *mixed_model(const char *name);

#endif

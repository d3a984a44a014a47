/* Equalization folded into the operation before the layers (algorithms.md 5): the producer of inputs x makes (x - m) s instead, the layers W / s of it, with
 * W m in their biases. Nothing is left to do when the model runs.
 *
 * fold.c applies folds to values of the source model and tells them to metadata.json; fold_choose.c chooses them in a run.
 */
#ifndef AQ_PIPELINE_FOLD_H
#define AQ_PIPELINE_FOLD_H

#include <arrowquant/store.h>
#include <arrowquant/time.h>
#include <jansson.h>

#include "model/producers.h"

typedef struct aq_fold {
    aq_producer producer;
    float *scales; /* s [n]; NULL: not folded */
    float *shift;  /* m [n], or NULL: 0 */
    aq_equalize strength;
    char *compared[AQ_PRODUCER_CONSUMERS]; /* what did worse for a consumer, for its report line; or NULL */
} aq_fold;

typedef struct aq_folds {
    aq_fold *items;
    size_t n;
} aq_folds;

void aq_folds_free(aq_folds *folds);
/* The fold that a weight's inputs come from, or NULL; `consumer` (may be NULL): which of its consumers it is. */
const aq_fold *aq_fold_of(const aq_folds *folds, size_t tensor, size_t *consumer);
/* Whether folds change values of a tensor: rows of a producer, or a consumer's bias. A consumer's weight is not changed: its codes are those of W / s. */
bool aq_folds_change(const aq_folds *folds, size_t tensor);
/* Elements [begin, begin + count) of a tensor of the source, as folds make them. The same bytes on every machine. */
aq_status aq_folds_read(const aq_folds *folds, const aq_model *model, size_t tensor, uint64_t begin, uint64_t count, float *out, aq_error *err);

/* The list "folds" of metadata.json. NULL: no memory. */
json_t *aq_folds_json(const aq_folds *folds, const aq_model *model);
/* The folds of a container as they apply to its source; those whose tensors the source lacks are left out. AQ_ERR_FORMAT when its metadata.json contradicts its
 * tensors. */
aq_status aq_folds_open(aq_folds *out, const aq_store *store, const aq_model *model, aq_error *err);

#endif

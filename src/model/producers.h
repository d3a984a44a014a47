/* Which operation of a model makes the inputs of a layer, where the model's structure is known: what can be folded into it. */
#ifndef AQ_MODEL_PRODUCERS_H
#define AQ_MODEL_PRODUCERS_H

#include <arrowquant/model.h>

typedef enum aq_producer_kind {
    AQ_PRODUCER_NORM,       /* norm(x) w + b */
    AQ_PRODUCER_MODULATION, /* norm(x) (1 + scale) + shift (adaLN): scale and shift are rows of a linear layer's output */
    AQ_PRODUCER_LINEAR      /* a linear layer with nothing but sums over tokens whose weights add up to 1 behind it (values of attention), or a product */
} aq_producer_kind;
const char *aq_producer_kind_name(aq_producer_kind kind); /* "norm", "modulation", "linear" */

enum { AQ_PRODUCER_PARTS = 4, AQ_PRODUCER_CONSUMERS = 4 };

/* n rows (elements of a vector) of a tensor from row_begin on, one for each input of the consumers. For the consumers to get (x - m) s they become
 * v s, of a part that adds_one v s + s - 1, of one that is shifted v s - m s. */
typedef struct aq_producer_part {
    size_t tensor;
    uint64_t row_begin;
    bool adds_one, shifted;
} aq_producer_part;

typedef struct aq_producer {
    aq_producer_kind kind;
    uint64_t n; /* inputs of the consumers */
    aq_producer_part parts[AQ_PRODUCER_PARTS];
    size_t n_parts;
    size_t consumers[AQ_PRODUCER_CONSUMERS]; /* weights of all layers that read it; nothing else does */
    int64_t biases[AQ_PRODUCER_CONSUMERS];   /* theirs, -1: none */
    size_t n_consumers;
    bool can_shift; /* a part is shifted and every consumer has a bias to take W m */
} aq_producer;

/* All producers of a model, by its class and its tensors' names; none when the structure is not known. *out: aq_free. AQ_ERR_MEMORY. */
aq_status aq_model_producers(const aq_model *model, aq_producer **out, size_t *n, aq_error *err);

#endif

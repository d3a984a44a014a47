/* Fuzz target: plan files. A plan that is accepted finds each of its layers by name, and its own text gives the same plan again. */
#include <stdlib.h>
#include <string.h>

#include <arrowquant/plan.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    aq_error err;
    aq_plan *plan, *again = NULL;
    char first[65], second[65];
    aq_status status = aq_plan_parse(&plan, (const char *)data, size, "plan.json", &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status != AQ_OK) return 0;
    for (size_t i = 0; i < aq_plan_n_layers(plan); i++) {
        const aq_plan_layer *layer = aq_plan_layer_at(plan, i);
        require(aq_plan_find(plan, layer->name) != NULL);
        require(layer->bits == 0 || layer->bits == 2 || layer->bits == 4 || layer->bits == 8 || layer->bits == 16);
    }
    char *text = aq_plan_to_json(plan), *same = NULL;
    require(text && aq_plan_parse(&again, text, strlen(text), "again.json", &err) == AQ_OK);
    require(aq_plan_n_layers(again) == aq_plan_n_layers(plan) && (same = aq_plan_to_json(again)) != NULL && strcmp(text, same) == 0);
    require(aq_plan_fingerprint(plan, first, &err) == AQ_OK && aq_plan_fingerprint(again, second, &err) == AQ_OK && strcmp(first, second) == 0);
    aq_plan_free_text(text);
    aq_plan_free_text(same);
    aq_plan_free(again);
    aq_plan_free(plan);
    return 0;
}

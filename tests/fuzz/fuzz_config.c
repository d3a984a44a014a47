/* Fuzz target: configuration files. The first byte chooses YAML (even) or JSON (odd), the rest is the file. What is accepted must be valid, must survive both
 * text forms unchanged, and its patterns must run. */
#include <stdlib.h>
#include <string.h>

#include <arrowquant/config.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

static void check_round_trip(const aq_config *config) {
    aq_error err;
    char *yaml = aq_config_to_yaml(config), *json = aq_config_to_json(config, false);
    aq_config *a = aq_config_create(), *b = aq_config_create();
    require(yaml && json && a && b);
    require(aq_config_load_yaml(a, yaml, strlen(yaml), "again.yaml", &err) == AQ_OK);
    require(aq_config_load_json(b, json, strlen(json), "again.json", &err) == AQ_OK);
    require(aq_config_equal(config, a) && aq_config_equal(config, b));
    aq_config_destroy(a);
    aq_config_destroy(b);
    aq_config_free_text(yaml);
    aq_config_free_text(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[] = {"blocks.0.attn.to_q.weight", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\xC3\xA9"};
    if (size == 0) return 0;
    aq_error err;
    aq_config *config = aq_config_create();
    const char *text = (const char *)data + 1;
    aq_status status = data[0] & 1 ? aq_config_load_json(config, text, size - 1, "f.json", &err) : aq_config_load_yaml(config, text, size - 1, "f.yaml", &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status == AQ_OK) {
        require(aq_config_validate(config, &err) == AQ_OK);
        check_round_trip(config);
        aq_config_check_names(config, names, 3, &err);
    }
    aq_config_destroy(config);
    return 0;
}

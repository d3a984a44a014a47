/* `arrowquant version`. */
#include "args.h"
#include "term.h"

int cli_run_version(const cli_args *args) {
    if (args->json) {
        json_t *root =
            json_pack("{s:s,s:s,s:s,s:s}", "schema", "arrowquant.version/1", "version", aq_version(), "container", AQ_SCHEMA_VERSION, "isa", aq_isa_name());
        cli_print_json(root);
        json_decref(root);
        return AQ_OK;
    }
    cli_print(stdout, "arrowquant %s\n", aq_version());
    if (args->verbose) cli_print(stdout, "container %s\nkernels %s\n", AQ_SCHEMA_VERSION, aq_isa_name());
    return AQ_OK;
}

/* From the command line to what the library takes: configuration and model options. */
#ifndef CLI_SETTINGS_H
#define CLI_SETTINGS_H

#include <arrowquant/config.h>
#include <arrowquant/model.h>

#include "args.h"

/* default < profile < file < environment < options, checked. `*out` is freed by aq_config_destroy. */
aq_status cli_settings_config(aq_config **out, const cli_args *args, aq_error *err);
/* Prints it: YAML, or JSON with --json. What is no setting follows as a comment, so that the run can be repeated. */
aq_status cli_settings_print(const aq_config *config, const cli_args *args, aq_error *err);

/* --component, --variant, --modality, --limit and so on. Strings are borrowed from args. */
aq_status cli_settings_model(aq_model_options *out, const cli_args *args, aq_error *err);

/* --shard-size in bytes; left as it is when not given. */
aq_status cli_settings_shards(uint64_t *out, const cli_args *args, aq_error *err);

#endif

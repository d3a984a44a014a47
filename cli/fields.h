/* One option for each field of the configuration (aq_config_field_at): `--field-name VALUE`; true-or-false fields as `--field-name` and `--no-field-name`
 * (`enable_x` also as `--no-x`). Made once, when options are first looked at.
 */
#ifndef CLI_FIELDS_H
#define CLI_FIELDS_H

#include "options.h"

size_t cli_n_field_options(void);
const cli_option *cli_field_option_at(size_t index);

#endif

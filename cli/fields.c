/* Options made from the configuration's fields (see fields.h). */
#include "fields.h"

size_t cli_n_field_options(void) { return 0; }

const cli_option *cli_field_option_at(size_t index) {
    (void)index;
    return NULL;
}

/* A look at a Parquet footer before the Parquet library parses it: bounds, nesting, counts, and where column chunks lie (PQ02-PQ04). */
#ifndef AQ_BASE_FOOTER_H
#define AQ_BASE_FOOTER_H

#include "base/error.h"

/* Checks the footer of `size` bytes of a file whose data end at data_end (the footer's offset). `file` is for messages. */
aq_status aq_footer_check(const uint8_t *footer, uint64_t size, uint64_t data_end, const char *file, aq_error *err);

#endif

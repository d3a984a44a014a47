/* What `export` and `quantize --to` share. */
#ifndef CLI_EXPORT_H
#define CLI_EXPORT_H

#include "job.h"

/* Where an export of a container goes when nothing else is said: "model-int4.gguf" for model-int4. aq_free; NULL: no memory. */
char *cli_export_path(const char *container, const char *to);
/* Prints "arrowquant.export/1". */
void cli_print_export(const cli_args *args, const json_t *report);

#endif

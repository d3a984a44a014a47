/* Regular expressions over tensor names in bounded time: no back-references and no look-around, so all alternatives are followed at once.
 *
 * Syntax: . [..] [^..] \d \w \s \D \W \S \b \B ^ $ | ( ) (?: ) * + ? {m} {m,} {m,n}, each quantifier also with ? behind it, \ before punctuation, \n \t.
 * A match is looked for anywhere in the text, as Python's re.search does. */
#ifndef AQ_PIPELINE_REGEX_H
#define AQ_PIPELINE_REGEX_H

#include <arrowquant/base.h>

typedef struct aq_regex aq_regex;

/* Compiles a pattern of at most 1,024 bytes. AQ_ERR_USAGE says what is wrong and where. Freed by aq_regex_destroy. */
aq_status aq_regex_create(aq_regex **out, const char *pattern, aq_error *err);
void aq_regex_destroy(aq_regex *regex);
/* At most size of program x length of text steps. Not for several threads at once on one regex: it holds the scratch. */
bool aq_regex_search(aq_regex *regex, const char *text);

#endif

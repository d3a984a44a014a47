/* Charts of the page as inline SVG (see page.h). Colours are classes of the page's style sheet, so they follow light, dark and print. Coordinates are whole
 * numbers or tenths in a view box; the page scales it. Each mark has a <title>, which browsers show when the pointer rests on it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "pipeline/page.h"

enum { WIDTH = 720, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 34 };

static const char *bits_class(int bits) { return bits == 2 ? "b2" : bits == 4 ? "b4" : "b8"; }

static void begin_chart(page_text *p, const char *title, int height) {
    aq_page_putf(p, "<figure><svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n", WIDTH, height, title);
}

static void end_chart(page_text *p, const char *caption) { aq_page_putf(p, "</svg><figcaption>%s</figcaption></figure>\n", caption); }

static void put_key(page_text *p, const char *style, const char *label) {
    aq_page_putf(p, " <span class=\"item\"><span class=\"key %s\"></span>%s</span>", style, label);
}

/* The same with the colours of the widths that layers have. */
static void end_chart_of_bits(page_text *p, const page_figures *f, const char *caption, bool kept) {
    aq_page_putf(p, "</svg><figcaption>%s", caption);
    for (int bits = 2; bits <= 8; bits *= 2) {
        bool any = false;
        char label[8];
        snprintf(label, sizeof label, "INT%d", bits);
        for (size_t i = 0; i < f->n_layers && !any; i++) any = f->layers[i].tensor->spec.bits == bits;
        if (any) put_key(p, bits_class(bits), label);
    }
    if (kept) put_key(p, "kept", "kept"), put_key(p, "frame", "names, footers");
    aq_page_put(p, "</figcaption></figure>\n");
}

static void attribute(page_text *p, const char *name, double value) {
    aq_page_putf(p, " %s=\"", name);
    aq_page_number(p, value, 1);
    aq_page_put(p, "\"");
}

/* A scale from values to coordinates. */
typedef struct axis {
    double low, high, from, to;
} axis;

static double place(const axis *a, double value) { return a->from + (a->to - a->from) * (a->high > a->low ? (value - a->low) / (a->high - a->low) : 0.5); }

/* The least of 1, 2, 5 times a power of ten that cuts the range into at most `most` steps. */
static double step_of(double range, int most) {
    double step = pow(10, floor(log10(range / most)));
    static const double factors[] = {1, 2, 5, 10};
    for (size_t i = 0; i < 4; i++)
        if (range / (step * factors[i]) <= most) return step * factors[i];
    return step * 10;
}

/* Widens a range of values to whole steps and draws its lines and numbers on the left. */
static axis vertical(page_text *p, double low, double high, int height, const char *unit) {
    if (!(high > low)) low -= 1, high += 1;
    double step = step_of(high - low, 6);
    axis y = {floor(low / step) * step, ceil(high / step) * step, height - BOTTOM, TOP};
    int n = (int)lround((y.high - y.low) / step);
    for (int i = 0; i <= n; i++) {
        double value = y.low + i * step, at = place(&y, value);
        aq_page_putf(p, "<path class=\"grid\" d=\"M%d ", LEFT);
        aq_page_number(p, at, 1);
        aq_page_putf(p, "H%d\"/><text class=\"tick\" text-anchor=\"end\" x=\"%d\"", WIDTH - RIGHT, LEFT - 6);
        attribute(p, "y", at + 4);
        aq_page_put(p, ">");
        aq_page_number(p, value, step < 1 ? 1 : 0);
        aq_page_putf(p, "%s</text>", i == n ? unit : "");
    }
    aq_page_put(p, "\n");
    return y;
}

static void below(page_text *p, double x, int height, const char *anchor, const char *text) {
    aq_page_putf(p, "<text class=\"tick\" text-anchor=\"%s\"", anchor);
    attribute(p, "x", x);
    aq_page_putf(p, " y=\"%d\">%s</text>", height - 10, text);
}

/* ---- sizes ---- */

typedef struct share {
    const char *style, *label;
    uint64_t bytes;
} share;

static void stacked_bar(page_text *p, int y, const char *label, const share *shares, size_t n, uint64_t full) {
    double x = LEFT + 30, width = WIDTH - RIGHT - x - 90;
    uint64_t total = 0;
    aq_page_putf(p, "<text class=\"label\" text-anchor=\"end\" x=\"%d\" y=\"%d\">%s</text>", LEFT + 22, y + 21, label);
    for (size_t i = 0; i < n; i++) {
        double part = full ? width * (double)shares[i].bytes / (double)full : 0;
        total += shares[i].bytes;
        if (shares[i].bytes == 0) continue;
        aq_page_putf(p, "<rect class=\"%s\" y=\"%d\" height=\"32\"", shares[i].style, y);
        attribute(p, "x", x);
        attribute(p, "width", part > 0.5 ? part : 0.5);
        aq_page_putf(p, "><title>%s: ", shares[i].label);
        aq_page_size(p, shares[i].bytes);
        aq_page_put(p, "</title></rect>");
        x += part;
    }
    aq_page_put(p, "<text class=\"label\"");
    attribute(p, "x", x + 8);
    aq_page_putf(p, " y=\"%d\">", y + 21);
    aq_page_size(p, total);
    aq_page_put(p, "</text>\n");
}

void aq_page_sizes(page_text *p, const page_figures *f) {
    share after[] = {{"b2", "INT2", 0}, {"b4", "INT4", 0}, {"b8", "INT8", 0}, {"kept", "kept", 0}, {"frame", "file structure and side files", 0}};
    uint64_t layers = 0;
    for (size_t i = 0; i < f->n_layers; i++) {
        const aq_store_tensor *t = f->layers[i].tensor;
        after[t->spec.bits == 2 ? 0 : t->spec.bits == 4 ? 1 : 2].bytes += t->stored_bytes;
        layers += t->stored_bytes;
    }
    after[3].bytes = f->stored_bytes - layers;
    uint64_t files = aq_store_size_bytes(f->store);
    after[4].bytes = files > f->stored_bytes ? files - f->stored_bytes : 0;
    share before = {"source", "tensors of the source", f->source_bytes};
    uint64_t full = f->source_bytes > files ? f->source_bytes : files;
    begin_chart(p, "Size before and after", 100);
    stacked_bar(p, 8, "before", &before, 1, full);
    stacked_bar(p, 56, "after", after, 5, full);
    end_chart_of_bits(p, f, "Bytes of the tensors in the source, and bytes on disk:", true);
}

/* ---- error per layer ---- */

static double shown_db(const page_layer *l) { return isfinite(l->output_db) ? l->output_db : l->weight_db; }

void aq_page_errors(page_text *p, const page_figures *f) {
    const int height = 260;
    double low = INFINITY, high = -INFINITY;
    bool outputs = false;
    for (size_t i = 0; i < f->n_layers; i++) {
        double db = shown_db(&f->layers[i]);
        outputs |= isfinite(f->layers[i].output_db);
        if (isfinite(db)) low = fmin(low, db), high = fmax(high, db);
    }
    if (!(low <= high)) return;
    begin_chart(p, "Signal to quantization noise of each layer", height);
    axis y = vertical(p, fmin(low - 1, 0), high, height, " dB"), x = {0, (double)f->n_layers, LEFT, WIDTH - RIGHT};
    double width = (x.to - x.from) / (double)f->n_layers * 0.7;
    if (width > 14) width = 14;
    for (size_t i = 0; i < f->n_layers; i++) {
        const page_layer *l = &f->layers[i];
        double db = shown_db(l), at = place(&x, (double)i + 0.5);
        if (!isfinite(db)) continue;
        aq_page_putf(p, "<rect class=\"%s\"", bits_class(l->tensor->spec.bits));
        attribute(p, "x", at - width / 2);
        attribute(p, "y", place(&y, db));
        attribute(p, "width", width);
        attribute(p, "height", y.from - place(&y, db));
        aq_page_put(p, "><title>");
        aq_page_name(p, l->tensor->name);
        aq_page_put(p, ": ");
        aq_page_number(p, db, 1);
        aq_page_putf(p, " dB, INT%d</title></rect>\n", l->tensor->spec.bits);
    }
    below(p, LEFT, height, "start", "first layer");
    below(p, WIDTH - RIGHT, height, "end", "last layer");
    end_chart_of_bits(p, f,
                      outputs ? "Signal to noise of each layer's output on the calibration data, in the model's order; higher is better. Layers without "
                                "calibration: of the weight."
                              : "Signal to noise of each layer's weight, in the model's order; higher is better.",
                      false);
}

/* ---- over the schedule ---- */

/* Groups run from noise (left, early in sampling) to clean (right). */
static void schedule_line(page_text *p, const char *style, const double *db, uint32_t n, const axis *x, const axis *y) {
    bool drawing = false;
    aq_page_putf(p, "<path class=\"%s\" d=\"", style);
    for (uint32_t i = 0; i < n; i++) {
        double value = db[n - 1 - i];
        if (!isfinite(value)) {
            drawing = false;
            continue;
        }
        aq_page_put(p, drawing ? "L" : "M");
        aq_page_number(p, place(x, (double)i), 1);
        aq_page_put(p, " ");
        aq_page_number(p, place(y, value), 1);
        drawing = true;
    }
    aq_page_put(p, "\"/>\n");
}

/* Mean over layers of the relative error, as decibels, and the worst layer. */
static void summarize(const page_figures *f, uint32_t g, double *mean, double *worst) {
    double sum = 0;
    size_t n = 0;
    *worst = (double)NAN;
    for (size_t i = 0; i < f->n_layers; i++) {
        double db = f->layers[i].group_db ? f->layers[i].group_db[g] : (double)NAN;
        if (!isfinite(db)) continue;
        sum += pow(10, -db / 10);
        n++;
        if (!(*worst <= db)) *worst = db;
    }
    *mean = n ? -10 * log10(sum / (double)n) : (double)NAN;
}

void aq_page_time(page_text *p, const page_figures *f) {
    const int height = 260;
    uint32_t n = f->n_groups;
    double low = INFINITY, high = -INFINITY, *mean = n > 1 ? aq_calloc(2 * (uint64_t)n, sizeof *mean) : NULL, *worst = mean ? mean + n : NULL;
    if (!mean) {
        p->failed |= n > 1;
        return;
    }
    for (uint32_t g = 0; g < n; g++) summarize(f, g, &mean[g], &worst[g]);
    for (size_t i = 0; i < f->n_layers; i++)
        for (uint32_t g = 0; f->layers[i].group_db && g < n; g++)
            if (isfinite(f->layers[i].group_db[g])) low = fmin(low, f->layers[i].group_db[g]), high = fmax(high, f->layers[i].group_db[g]);
    if (low <= high) {
        begin_chart(p, "Error of the layers over the schedule", height);
        axis y = vertical(p, low, high, height, " dB"), x = {0, (double)n - 1, LEFT + 12, WIDTH - RIGHT - 12};
        for (size_t i = 0; i < f->n_layers && f->n_layers <= 400; i++)
            if (f->layers[i].group_db) schedule_line(p, "faint", f->layers[i].group_db, n, &x, &y);
        schedule_line(p, "line worst", worst, n, &x, &y);
        schedule_line(p, "line", mean, n, &x, &y);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t start, end;
            aq_calib_group_range(f->calib, n - 1 - i, &start, &end);
            aq_page_put(p, "<circle class=\"dot\" r=\"4\"");
            attribute(p, "cx", place(&x, (double)i));
            attribute(p, "cy", place(&y, isfinite(mean[n - 1 - i]) ? mean[n - 1 - i] : y.low));
            aq_page_putf(p, "><title>timesteps %u to %u: mean ", start, end ? end - 1 : 0);
            aq_page_number(p, mean[n - 1 - i], 1);
            aq_page_put(p, " dB, worst layer ");
            aq_page_number(p, worst[n - 1 - i], 1);
            aq_page_put(p, " dB</title></circle>\n");
        }
        below(p, LEFT, height, "start", "noise: sampling starts");
        below(p, WIDTH - RIGHT, height, "end", "clean: sampling ends");
        end_chart(p, "Signal to noise of the layers' outputs per group of timesteps: the line is the mean over layers, the dashed one the worst layer, each "
                     "faint line a layer.");
    }
    aq_free(mean);
}

/* ---- sensitivity against bits ---- */

static void share_tick(page_text *p, const axis *x, int height, double value, int decimals) {
    double at = place(x, log10(value));
    page_text label = {0};
    if (at < x->from || at > x->to) return;
    aq_page_number(&label, 100 * value, decimals);
    aq_page_put(&label, " %");
    if (label.data) below(p, at, height, at > x->to - 20 ? "end" : "middle", label.data);
    aq_free(label.data);
}

/* Numbers under a logarithmic axis of shares: even steps within a decade, else 1 of each power of ten, and 2 and 5 where there is room. */
static void shares(page_text *p, const axis *x, int height) {
    double low = pow(10, x->low), high = pow(10, x->high), step = step_of(high - low, 6);
    int decimals = (int)fmax(0, -floor(log10(step)) - 2);
    for (int i = (int)ceil(low / step); x->high - x->low < 1 && i * step <= high; i++) share_tick(p, x, height, i * step, decimals);
    for (int tick = (int)floor(3 * x->low); x->high - x->low >= 1 && tick <= (int)ceil(3 * x->high); tick++) {
        static const double factors[] = {1, 2, 5};
        int decade = (int)floor(tick / 3.0);
        if (tick == 3 * decade || x->high - x->low < 2.5) share_tick(p, x, height, factors[tick - 3 * decade] * pow(10, decade), decade < -2 ? -2 - decade : 0);
    }
}

void aq_page_sensitivity(page_text *p, const page_figures *f) {
    const int height = 200;
    static const int widths[] = {2, 4, 8};
    double low = INFINITY, high = -INFINITY;
    for (size_t i = 0; i < f->n_layers; i++)
        if (f->layers[i].sensitivity > 0) low = fmin(low, log10(f->layers[i].sensitivity)), high = fmax(high, log10(f->layers[i].sensitivity));
    if (!(low <= high)) return;
    axis x = {low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02, LEFT, WIDTH - RIGHT};
    begin_chart(p, "Sensitivity of the layers against their bits", height);
    for (int i = 0; i < 3; i++) {
        int at = height - BOTTOM - 26 - i * 46;
        aq_page_putf(p, "<path class=\"grid\" d=\"M%d %dH%d\"/><text class=\"tick\" text-anchor=\"end\" x=\"%d\" y=\"%d\">INT%d</text>", LEFT, at,
                     WIDTH - RIGHT, LEFT - 6, at + 4, widths[i]);
    }
    shares(p, &x, height);
    for (size_t i = 0; i < f->n_layers; i++) {
        const page_layer *l = &f->layers[i];
        if (!(l->sensitivity > 0)) continue;
        int row = l->tensor->spec.bits == 2 ? 0 : l->tensor->spec.bits == 4 ? 1 : 2, spread = (int)(i * 7 % 23) - 11; /* apart, so that dots do not hide dots */
        aq_page_putf(p, "<circle class=\"%s mark\" r=\"4\" cy=\"%d\"", bits_class(l->tensor->spec.bits), height - BOTTOM - 26 - row * 46 + spread);
        attribute(p, "cx", place(&x, log10(l->sensitivity)));
        aq_page_put(p, "><title>");
        aq_page_name(p, l->tensor->name);
        aq_page_put(p, ": ");
        aq_page_number(p, 100 * l->sensitivity, 3);
        aq_page_put(p, " %</title></circle>\n");
    }
    end_chart(p, "Each dot is a layer: the relative error that 4 bits in groups of 128, rounded to nearest, would leave in it (of its output where there is "
                 "calibration, else of its weight), and the bits it has. A good plan gives the layers on the right more bits.");
}

/* ---- histograms ---- */

void aq_page_histograms(page_text *p, const page_figures *f) {
    const int height = 240;
    const page_histogram *h = &f->histogram;
    if (!h->layer || h->most == 0) return;
    axis x = {0, PAGE_BINS, LEFT, WIDTH - RIGHT}, y = {0, sqrt((double)h->most), height - BOTTOM, TOP};
    begin_chart(p, "Histogram of one layer before and after", height);
    for (size_t i = 0; i < PAGE_BINS; i++) {
        if (h->after[i] == 0) continue;
        double top = place(&y, sqrt((double)h->after[i]));
        aq_page_put(p, "<rect class=\"after\"");
        attribute(p, "x", place(&x, (double)i));
        attribute(p, "y", top);
        attribute(p, "width", (x.to - x.from) / PAGE_BINS);
        attribute(p, "height", y.from - top);
        aq_page_put(p, "/>");
    }
    if (h->has_before) {
        aq_page_put(p, "\n<path class=\"before\" d=\"M");
        for (size_t i = 0; i < PAGE_BINS; i++) {
            aq_page_put(p, i ? "H" : "");
            aq_page_number(p, place(&x, (double)i), 1);
            aq_page_put(p, i ? "V" : " ");
            aq_page_number(p, place(&y, sqrt((double)h->before[i])), 1);
        }
        aq_page_putf(p, "H%d\"/>", WIDTH - RIGHT);
    }
    aq_page_put(p, "\n");
    page_text low = {0}, high = {0};
    aq_page_number(&low, h->low, 4);
    aq_page_number(&high, h->high, 4);
    if (low.data) below(p, LEFT, height, "start", low.data);
    if (high.data) below(p, WIDTH - RIGHT, height, "end", high.data);
    aq_free(low.data);
    aq_free(high.data);
    end_chart(p, h->has_before ? "Values after (bars) and before (line). Heights are square roots of counts, so that the tails can be seen."
                               : "Values after; --against SOURCE adds those before. Heights are square roots of counts, so that the tails can be seen.");
}

/* Buffered writing of the spool: see spool.h. A full disk is remembered, not retried: what the drain then cannot
 * write it counts.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spool.h"

#define BUFFER (256 * 1024)

static const char *const out_names[PL_OUTS] = { "faults", "calls", "switches", "stacks", "text", "raw" };

static void flush_out(struct pl_spool *s, struct pl_out *o)
{
	size_t done = 0;

	while (done < o->used && !s->error) {
		ssize_t n = write(o->fd, o->buffer + done, o->used - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			s->error = n < 0 ? errno : EIO;
			break;
		}
		done += (size_t)n;
	}
	o->used = 0;
}

void pl_spool_put(struct pl_spool *s, int which, const void *data, size_t size)
{
	struct pl_out *o = &s->out[which];

	if (o->used + size > BUFFER)
		flush_out(s, o);
	memcpy(o->buffer + o->used, data, size);
	o->used += size;
	o->bytes += size;
}

int pl_spool_init(struct pl_spool *s, const char *dir)
{
	for (int i = 0; i < PL_OUTS; i++)
		s->out[i] = (struct pl_out){ .fd = -1 };
	if (strlen(dir) >= sizeof(s->dir))
		return ENAMETOOLONG;
	strcpy(s->dir, dir);
	for (int i = 0; i < PL_OUTS; i++) {
		s->out[i].buffer = malloc(BUFFER);
		if (!s->out[i].buffer)
			return ENOMEM;
	}
	return 0;
}

int pl_spool_open(struct pl_spool *s)
{
	char name[4096];

	for (int i = 0; i < PL_OUTS; i++) {
		snprintf(name, sizeof(name), "%s/%08llu.%s", s->dir, (unsigned long long)s->segment, out_names[i]);
		s->out[i].fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
		if (s->out[i].fd < 0)
			return errno;
		s->out[i].bytes = 0;
		s->out[i].used = 0;
	}
	return 0;
}

void pl_spool_close(struct pl_spool *s)
{
	for (int i = 0; i < PL_OUTS; i++) {
		if (s->out[i].fd < 0)
			continue;
		flush_out(s, &s->out[i]);
		close(s->out[i].fd);
		s->out[i].fd = -1;
	}
}

void pl_spool_free(struct pl_spool *s)
{
	for (int i = 0; i < PL_OUTS; i++) {
		if (s->out[i].fd >= 0)
			close(s->out[i].fd);
		free(s->out[i].buffer);
	}
}

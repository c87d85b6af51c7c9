/* Small servers that do what real ones do to their descriptors: hazards CASE OUTPUT. Each writes what its calls
 * returned, so that a run under the library can be compared with one without. */
#ifndef HAZARDS_H
#define HAZARDS_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef ssize_t reader(int fd, char *buffer, size_t room);
struct hazard { const char *name; void (*run)(void); };
extern const struct hazard process_hazards[], reading_hazards[], pending_hazards[];

extern const char *output_path;
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* "5", or "-1 EAGAIN". */
const char *result(long value);
int listen_on(int port);
int accept_said(int listener);
int respond(int fd);
/* Serves requests until the end; says what each read returned. */
void serve(int fd, reader *read_some);
ssize_t plain_read(int fd, char *buffer, size_t room);
#endif

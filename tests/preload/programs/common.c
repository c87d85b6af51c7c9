#include "hazards.h"

const char *output_path;

void say(const char *format, ...)
{
	char line[512];
	va_list arguments;
	va_start(arguments, format);
	int n = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	line[n++] = '\n';
	int out = open(output_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
	if (out < 0 || write(out, line, n) != n)
		abort();
	close(out);
}

const char *result(long value)
{
	static __thread char text[64];
	if (value < 0)
		snprintf(text, sizeof text, "-1 %s", strerrorname_np(errno));
	else
		snprintf(text, sizeof text, "%ld", value);
	return text;
}

int listen_on(int port)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, (struct sockaddr *)&to, sizeof to) || listen(fd, 64))
		say("bind or listen: %s", result(-1));
	return fd;
}

int accept_said(int listener)
{
	struct sockaddr_in client;
	socklen_t len = sizeof client;
	int fd = accept(listener, (struct sockaddr *)&client, &len);
	say("accept %s, address of %u bytes", fd < 0 ? result(fd) : "a connection", len);
	return fd;
}

int respond(int fd)
{
	const char text[] = "HTTP/1.1 200 OK\r\nX-Node: host\r\nContent-Length: 2\r\n\r\nok";
	return write(fd, text, sizeof text - 1);
}

ssize_t plain_read(int fd, char *buffer, size_t room)
{
	return read(fd, buffer, room);
}

void serve(int fd, reader *read_some)
{
	char buffer[8192];
	size_t have = 0;
	for (;;) {
		ssize_t n = read_some(fd, buffer + have, sizeof buffer - have);
		say("read %s", result(n));
		if (n <= 0)
			break;
		have += n;
		if (!memmem(buffer, have, "\r\n\r\n", 4))
			continue;
		have = 0;
		say("write %s", result(respond(fd)));
	}
	say("close %s", result(close(fd)));
	say("close again %s", result(close(fd)));
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	output_path = arguments[2];
	signal(SIGPIPE, SIG_IGN);
	const struct hazard *tables[] = { process_hazards, reading_hazards, pending_hazards };
	for (int t = 0; t < 3; t++)
		for (const struct hazard *h = tables[t]; h->name; h++)
			if (!strcmp(h->name, arguments[1]))
				h->run();
	return 3;
}

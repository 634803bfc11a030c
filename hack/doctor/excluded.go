package doctor

import (
	"bufio"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Excluded is a range of ports that Windows keeps from programs.
type Excluded struct {
	First, Last  int
	Administered bool // by an administrator: netsh marks it with a *
}

// Only the digits count: the headings are in the language of the system, and so is what stands below.
var excludedLine = regexp.MustCompile(`^\s*(\d+)\s+(\d+)\s*(\*?)\s*$`)

// ParseExcluded reads what `netsh int ipv4 show excludedportrange protocol=tcp` prints.
func ParseExcluded(printed string) (list []Excluded) {
	lines := bufio.NewScanner(strings.NewReader(printed))
	for lines.Scan() {
		m := excludedLine.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		first, err1 := strconv.ParseUint(m[1], 10, 16)
		last, err2 := strconv.ParseUint(m[2], 10, 16)
		if err1 == nil && err2 == nil && first <= last {
			list = append(list, Excluded{int(first), int(last), m[3] != ""})
		}
	}
	return list
}

// reserveLine has a Linux VM on that host keep off what the host excludes.
func reserveLine(list []Excluded) string {
	var spans []string
	for _, e := range list {
		span := strconv.Itoa(e.First)
		if e.Last != e.First {
			span += "-" + strconv.Itoa(e.Last)
		}
		spans = append(spans, span)
	}
	return "sysctl -w net.ipv4.ip_local_reserved_ports=" + strings.Join(spans, ",")
}

// rangeOf is the range that has the port, or nil. Of ranges that overlap, an administered one counts: the port is then kept for
// whoever asks for it by number.
func rangeOf(list []Excluded, port int) (in *Excluded) {
	for i, e := range list {
		if e.First <= port && port <= e.Last && (in == nil || e.Administered) {
			in = &list[i]
		}
	}
	return in
}

// administered says of a port that an administrator has excluded it.
func administered(list []Excluded, family, proto string, port int) *Finding {
	in := rangeOf(list, port)
	if in == nil || !in.Administered {
		return nil
	}
	return &Finding{Mark: Note, Says: fmt.Sprintf("is excluded by an administrator (%d-%d *, %s, %s): nobody gets it by chance, and you, by its number", in.First, in.Last, family, proto)}
}

// excluded says of a port that Windows itself has excluded it.
func excluded(list []Excluded, family, proto string, port int) *Finding {
	in := rangeOf(list, port)
	if in == nil || in.Administered {
		return nil
	}
	return &Finding{
		Says: fmt.Sprintf("is excluded by Windows (%d-%d, %s, %s): no program holds it, and none can have it", in.First, in.Last, family, proto),
		Do:   "have it excluded for yourself, as an administrator, while winnat is stopped",
		Root: []string{
			"net stop winnat",
			fmt.Sprintf("netsh int %s add excludedportrange protocol=%s startport=%d numberofports=1", family, proto, port),
			"net start winnat",
		},
	}
}

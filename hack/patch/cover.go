package patch

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"berth/hack/pins"
)

// The letter's subject is its first line. The other paragraphs are the mail's.
//
//go:embed cover.txt
var coverText string

// letter is the first mail of the series.
type letter struct{ subject, body string }

// cover puts into the text the tables that the tests wrote to docs/.
func (s Series) cover() (letter, error) {
	text := coverText
	for _, table := range []struct{ name, file, heading string }{
		{"bases", "bases.md", ""},
		{"upstream", "upstream.md", ""},
		{"held", "upstream.md", "\n## With ports of the host held\n"},
	} {
		data, err := os.ReadFile(filepath.Join(s.Root, "docs", table.file))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return letter{}, err
		}
		_, from, _ := strings.Cut(string(data), table.heading)
		rows := tableOf(from)
		if rows == "" {
			rows = "(not measured)"
		}
		text = strings.ReplaceAll(text, "{{"+table.name+"}}", rows)
	}
	subject, body, _ := strings.Cut(text, "\n\n")
	return letter{subject, strings.TrimSpace(body)}, nil
}

// tableOf is the first table of a Markdown text.
func tableOf(text string) string {
	var rows []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "|") {
			rows = append(rows, strings.TrimSpace(line))
		} else if rows != nil {
			break
		}
	}
	return strings.Join(rows, "\n")
}

// into puts the letter into git's, and tells after it what the series is for: the Go module proxy knows a base's tag, not its commit.
func (l letter) into(mail string, base pins.Pin) string {
	mail = strings.Replace(mail, "*** SUBJECT HERE ***", l.subject, 1)
	mail = strings.Replace(mail, "*** BLURB HERE ***", l.body, 1)
	return fmt.Sprintf("%s\n\nbase-commit: %s\n", strings.TrimRight(mail, "\n"), base.Version)
}

// Command skips fails when a test was skipped that .ci/skips does not expect: a skip must not hide that something stopped being
// tested. gotestsum runs it after the tests; else its argument is a file of `go test -json`.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"gotest.tools/gotestsum/testjson"
)

const listName = ".ci/skips"

func main() {
	name := os.Getenv("GOTESTSUM_JSONFILE")
	if len(os.Args) == 2 {
		name = os.Args[1]
	}
	if err := run(os.Stdout, listName, name, os.Getuid() == 0); err != nil {
		fmt.Fprintln(os.Stderr, "skips:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, listName, resultsName string, root bool) error {
	f, err := os.Open(listName)
	if err != nil {
		return err
	}
	defer f.Close()
	list, err := parse(f)
	if err != nil {
		return fmt.Errorf("%s:%w", listName, err)
	}
	results, err := os.Open(resultsName)
	if err != nil {
		return err
	}
	defer results.Close()
	exec, err := testjson.ScanTestOutput(testjson.ScanConfig{Stdout: results})
	if err != nil {
		return fmt.Errorf("%s: %w", resultsName, err)
	}
	if exec.Total() == 0 {
		return fmt.Errorf("%s: no test ran", resultsName)
	}
	skipped := exec.Skipped()
	unexpected := 0
	for _, tc := range skipped {
		test := testjson.RelativePackagePath(tc.Package) + "." + string(tc.Test)
		if !expected(list, test, root) {
			unexpected++
			// What the test said: its reason is among it.
			fmt.Fprintf(out, "not expected to be skipped: %s\n%s", test, strings.Join(exec.Package(tc.Package).OutputLines(tc), ""))
		}
	}
	if unexpected > 0 {
		return fmt.Errorf("%d of %d skips are not in %s: have them run, or list them with the reason", unexpected, len(skipped), listName)
	}
	if len(skipped) > 0 {
		fmt.Fprintf(out, "%d skipped, as %s expects\n", len(skipped), listName)
	}
	return nil
}

// skip is a line of the list. The comments at its head say what each field means.
type skip struct {
	user bool // expected unless root runs the tests, else always
	test string
}

func parse(r io.Reader) ([]skip, error) {
	var list []skip
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		fields := strings.Fields(sc.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if err := checkLine(fields); err != nil {
			return nil, fmt.Errorf("%d: %w", n, err)
		}
		list = append(list, skip{user: fields[0] == "user", test: fields[1]})
	}
	return list, sc.Err()
}

func checkLine(fields []string) error {
	if len(fields) < 3 {
		return errors.New("want who, a test and the reason")
	}
	if fields[0] != "user" && fields[0] != "all" {
		return fmt.Errorf("want user or all, not %q", fields[0])
	}
	_, err := path.Match(fields[1], "")
	return err
}

func expected(list []skip, test string, root bool) bool {
	for _, s := range list {
		if ok, _ := path.Match(s.test, test); ok && !(s.user && root) {
			return true
		}
	}
	return false
}

// Package pins reads vendor.conf, the one list of what Berth builds from elsewhere.
package pins

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/module"
)

// Pin is one line of vendor.conf. The comments at the head of that file say what each setting means.
type Pin struct {
	Name    string // unique in the file
	Module  string // Go module path, or the name of a Debian source package
	Version string // the module's, canonical, or upstream's in the Debian package's
	Release string // the product's own version without a "v": the module's unless the line says otherwise
	Patch   int    // Berth's patch number on a base's line, 0 on all others
	NAT     string // on a base's line: the hash of the nat package that the patch was written against

	Packages []string // to build, each "." or "./..."
	Files    []string // to take as they are, relative to the source's folder; made first when that is Debian's
	Tags     []string // Go build tags
	CGO      bool
	Optional bool // not built unless asked for by name

	VersionVar string // the variable that the linker sets to the version, or ""
	CommitVar  string // the variable that the linker sets to the git commit, or ""

	Debian string   // the Debian suite whose source package this is, or "": then it is a Go module
	SHA256 string   // of that package's upstream archive
	Make   []string // what make is given before the file's name: goals, and variables
	Sum    string   // the Go module's, as go.sum writes it ("h1:..."), or "": then go.sum has it
}

// Load reads the file at path.
func Load(path string) ([]Pin, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return Parse(path, f)
}

// Parse reads r. Its errors start with name and the number of the first line that is wrong.
func Parse(name string, r io.Reader) ([]Pin, error) {
	var list []Pin
	var base Pin // the default one
	lines := map[string]int{}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		fields := strings.Fields(sc.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		id := fields[0] // the line's name, on a base's line with the version
		var pin Pin
		var err error
		if older := base.Patch != 0 && len(fields) >= 3 && id == base.Name; older {
			id += " " + fields[2]
			pin, err = base.older(fields)
		} else {
			pin, err = parseLine(fields)
		}
		switch {
		case err != nil:
		case lines[id] != 0:
			err = fmt.Errorf("name %q is already used on line %d", id, lines[id])
		case pin.Patch != 0 && base.Patch != 0 && pin.Name != base.Name:
			err = fmt.Errorf("a second base (patch=%d): the first is on line %d, and another of its versions has its name", pin.Patch, lines[base.Name])
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, n, err)
		}
		lines[id] = n
		if pin.Patch != 0 && base.Patch == 0 {
			base = pin
			lines[id+" "+pin.Version] = n
		}
		list = append(list, pin)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return list, nil
}

// Base is the base of the version given, "" for the default one.
func Base(list []Pin, version string) (Pin, error) {
	bases := Bases(list)
	for _, base := range bases {
		if version == "" || version == base.Version {
			return base, nil
		}
	}
	if len(bases) == 0 {
		return Pin{}, errors.New("vendor.conf has no base: no line has patch=")
	}
	var known []string
	for _, base := range bases {
		known = append(known, base.Version)
	}
	return Pin{}, fmt.Errorf("no base %s in vendor.conf: there are %s", version, strings.Join(known, ", "))
}

// Bases are the versions of upstream that Berth is a patch for, the default one first.
func Bases(list []Pin) []Pin {
	return slices.DeleteFunc(slices.Clone(list), func(pin Pin) bool { return pin.Patch == 0 })
}

func parseLine(fields []string) (Pin, error) {
	if len(fields) < 3 {
		return Pin{}, fmt.Errorf("want a name, a module and a version, got %q", strings.Join(fields, " "))
	}
	pin := Pin{Name: fields[0], Module: fields[1], Version: fields[2]}
	pin.Release = strings.TrimSuffix(strings.TrimPrefix(pin.Version, "v"), "+incompatible")
	if err := setAll(fields[3:], pin.set); err != nil {
		return Pin{}, err
	}
	if len(pin.Packages)+len(pin.Files) == 0 {
		return Pin{}, errors.New("nothing to build: add packages= or files=")
	}
	return pin, pin.checkSource()
}

// older is another version of p, which is the default base: it has p's settings, but for what tells the two apart.
func (p Pin) older(fields []string) (Pin, error) {
	if fields[1] != p.Module {
		return Pin{}, fmt.Errorf("name %q is already that of %s", p.Name, p.Module)
	}
	p.Version, p.Release, p.NAT, p.Sum = fields[2], strings.TrimPrefix(fields[2], "v"), "", ""
	err := setAll(fields[3:], func(key, value string) error {
		if key != "release" && key != "nat" && key != "h1" {
			return fmt.Errorf("%s=: another base takes it from the default one's line", key)
		}
		return p.set(key, value)
	})
	if err != nil {
		return Pin{}, err
	}
	return p, p.checkSource()
}

func setAll(fields []string, set func(key, value string) error) error {
	seen := map[string]bool{}
	for _, field := range fields {
		key, value, ok := strings.Cut(field, "=")
		if !ok || value == "" {
			return fmt.Errorf("want key=value, got %q", field)
		}
		if seen[key] {
			return fmt.Errorf("%s is given twice", key)
		}
		seen[key] = true
		if err := set(key, value); err != nil {
			return err
		}
	}
	return nil
}

var (
	debianPackage = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*$`)
	debianVersion = regexp.MustCompile(`^[0-9][A-Za-z0-9.+~]*$`) // what comes after a "-" is Debian's revision
	sha256sum     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	h1sum         = regexp.MustCompile(`^h1:[0-9A-Za-z+/]{43}=$`)
)

// checkSource checks what names the source, whichever kind it is.
func (p *Pin) checkSource() error {
	switch {
	case p.Debian == "" && (p.SHA256 != "" || p.Make != nil):
		return errors.New("sha256= and make= are for lines with debian=")
	case p.Debian == "" && p.Sum != "" && !h1sum.MatchString(p.Sum):
		return fmt.Errorf("%s: want h1= and the 44 characters of a Go module's hash", p.Sum)
	case p.Debian == "":
		return module.Check(p.Module, p.Version)
	case p.Sum != "":
		return errors.New("h1= is for Go modules")
	case len(p.Packages) > 0:
		return errors.New("packages= is for Go modules: what is made of a Debian source package are its files=")
	case !debianPackage.MatchString(p.Module):
		return fmt.Errorf("malformed Debian source package %q", p.Module)
	case !debianVersion.MatchString(p.Version):
		return fmt.Errorf("%s %s: want an upstream version, without Debian's revision", p.Module, p.Version)
	case !sha256sum.MatchString(p.SHA256):
		return fmt.Errorf("sha256=%s: want the 64 hexadecimal digits of %s's upstream archive", p.SHA256, p.Module)
	}
	return nil
}

func (p *Pin) set(key, value string) (err error) {
	switch key {
	case "packages":
		p.Packages = strings.Split(value, ",")
		for _, pkg := range p.Packages {
			if pkg != "." && !strings.HasPrefix(pkg, "./") {
				return fmt.Errorf("package %q: want \".\" or a path that starts with \"./\"", pkg)
			}
		}
	case "files":
		p.Files = strings.Split(value, ",")
	case "tags":
		p.Tags = strings.Split(value, ",")
	case "cgo":
		p.CGO, err = yes(key, value)
	case "optional":
		p.Optional, err = yes(key, value)
	case "release":
		p.Release = value
	case "patch":
		p.Patch, err = strconv.Atoi(value)
		if err != nil || p.Patch < 1 {
			return fmt.Errorf("patch=%s: want a number from 1 up", value)
		}
	case "nat":
		p.NAT = value
	case "version-var":
		p.VersionVar = value
	case "commit-var":
		p.CommitVar = value
	case "debian":
		p.Debian = value
	case "sha256":
		p.SHA256 = value
	case "h1":
		p.Sum = "h1:" + value
	case "make":
		p.Make = strings.Split(value, ",")
	default:
		return fmt.Errorf("unknown key %q", key)
	}
	return err
}

func yes(key, value string) (bool, error) {
	if value != "yes" {
		return false, fmt.Errorf("%s=%s: want %s=yes, or leave it out", key, value, key)
	}
	return true, nil
}

# The project in a container. GPU=1 takes the CUDA image and all GPUs.
#
#   make build      make run [ARGS="--seeds 42 43 44"]      make test      make jupyter      make sh      make stop
IMAGE := p4_bert_vs_lora_vs_adapters
TAG := $(IMAGE)$(if $(GPU),:gpu)
TTY := $(shell [ -t 0 ] && echo --interactive --tty)
IN := docker run --rm --init $(TTY) --shm-size 1g --volume "$(CURDIR)":/workspace $(if $(GPU),--gpus all)
# Files that a container writes belong to this user, also under sudo.
USER_ID := $(or $(SUDO_UID),$(shell id -u))
GROUP_ID := $(or $(SUDO_GID),$(shell id -g))

.PHONY: build run test jupyter sh stop
build:
	@[ $(USER_ID) -ne 0 ] || { echo "error: build as a user other than root, who will own the results" >&2; exit 1; }
	docker build --tag $(TAG) --build-arg GPU=$(if $(GPU),1,0) \
	  --build-arg UID=$(USER_ID) --build-arg GID=$(GROUP_ID) .
run:
	$(IN) --name $(IMAGE)_run $(TAG) bash run_all.sh $(ARGS)
test:
	$(IN) --name $(IMAGE)_test $(TAG) bash tests/run.sh $(ARGS)
jupyter:  # it prints the address, with the token that it asks for
	$(IN) --name $(IMAGE)_jupyter --publish 127.0.0.1:8888:8888 $(TAG) \
	  jupyter lab --ip 0.0.0.0 --port 8888 --no-browser comparison.ipynb
sh:
	$(IN) --name $(IMAGE)_sh $(TAG) bash
stop:
	docker ps --quiet --filter name=^$(IMAGE)_ | xargs -r docker stop

from sfmodel.cli import main

main()
